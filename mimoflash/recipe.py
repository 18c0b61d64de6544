"""A recipe: what a run makes, from a TOML file, checked before anything starts.

There are four kinds: a model from nothing (`Recipe`), post-training of one that is there (`PostTrainingRecipe`), that
by several methods and over several seeds (`ComparisonRecipe`), and MTP layers for one that is there (`HeadsRecipe`).
"""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator, with_config

from mimoflash.config import ModelConfig
from mimoflash.data import DomainSource, FolderSource, StdlibSource
from mimoflash.posttrain import ConversationSettings, GRPOSettings, MOPDSettings, SourceSettings
from mimoflash.posttrain.rivals import OffPolicySettings
from mimoflash.text import Tokenizer
from mimoflash.train import HeadsSettings, StageSettings
from mimoflash.world import Domain, Split, domain, seeds

RECIPES = Path(__file__).parent / "recipes"

_STRICT = ConfigDict(extra="forbid")
for _settings in (
    StageSettings, FolderSource, StdlibSource, DomainSource, ConversationSettings, HeadsSettings, GRPOSettings,
    MOPDSettings, SourceSettings, OffPolicySettings,
):
    with_config(_STRICT)(_settings)

Positive = Annotated[int, Field(gt=0)]


class TokenizerSettings(BaseModel):
    """A BPE of `vocab_size` entries, trained on the first `documents` of each source."""

    model_config = _STRICT
    vocab_size: Positive
    documents: Positive = 2000


class EngineSettings(BaseModel):
    """What rollouts are played by: `dtype` of the weights, `max_running` at a time."""

    model_config = _STRICT
    dtype: Literal["float32", "bf16", "int8", "int4"] = "float32"
    max_running: Positive = 256


class RivalSettings(BaseModel):
    """What MOPD is compared with: those that are given (see posttrain/rivals.py)."""

    model_config = _STRICT
    mix_rl: GRPOSettings | None = None
    cascade_rl: GRPOSettings | None = None
    off_policy: OffPolicySettings | None = None
    naive_mopd: MOPDSettings | None = None
    param_merge: bool = False


class EvaluateSettings(BaseModel):
    """`tasks` held-out tasks of each domain from the `first` on, `samples` answers to each at `temperature` (0:
    greedy), at most `max_tokens` a turn; `conversations` of each are shown."""

    model_config = _STRICT
    first: Annotated[int, Field(ge=0)] = 0
    tasks: Positive = 100
    samples: Positive = 1
    temperature: Annotated[float, Field(ge=0)] = 0.0
    max_tokens: Positive = 160
    conversations: Annotated[int, Field(ge=0)] = 2


Source = Annotated[FolderSource | StdlibSource | DomainSource, Field(discriminator="kind")]


class Recipe(BaseModel):
    """What a run makes. `sources` by name; stages choose from them by their mixtures. `model` holds ModelConfig's
    fields, without the vocabulary's size and special tokens, which the tokenizer brings. `teachers` by domain: MOPD and
    its rivals are about these domains. Stages that are not described do not run."""

    model_config = _STRICT
    name: str
    seed: int = 0
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.02
    model: dict[str, Any]
    tokenizer: TokenizerSettings
    sources: dict[str, Source]
    pretrain: StageSettings
    sft: StageSettings
    rollouts: EngineSettings = EngineSettings()
    teachers: dict[str, GRPOSettings] | None = None
    mopd: MOPDSettings | None = None
    rivals: RivalSettings | None = None
    evaluate: EvaluateSettings = EvaluateSettings()

    @model_validator(mode="after")
    def _checked(self) -> Self:
        """What only the whole recipe can show, before hours are spent on it."""
        names = sorted({source.domain for source in self.sources.values() if isinstance(source, DomainSource)})
        if unknown := sorted((self.teachers or {}).keys() - set(names)):
            raise ValueError(f"teachers names {unknown[0]!r}; the domains of the sources are {', '.join(names)}")
        for later in ("mopd", "rivals"):
            if getattr(self, later) is not None and not self.teachers:
                raise ValueError(f"{later} needs teachers: describe one for each domain, as [teachers.arithmetic]")
        _check_sources(self)
        for stage in ("pretrain", "sft"):
            unknown = sorted(set(getattr(self, stage).mixture) - set(self.sources))
            if unknown:
                known = ", ".join(self.sources)
                raise ValueError(f"{stage}.mixture names {unknown[0]!r}; the sources are {known}")
        for source in self.sources.values():
            if isinstance(source, DomainSource):
                domain(source.domain, **source.options)
        _config(self, vocab_size=self.tokenizer.vocab_size)
        return self

    def domains(self) -> dict[str, Domain]:
        """Those of the sources, by name (the first of several sources that share a domain)."""
        found: dict[str, Domain] = {}
        for source in self.sources.values():
            if isinstance(source, DomainSource) and source.domain not in found:
                found[source.domain] = domain(source.domain, **source.options)
        return found


class TaskSettings(BaseModel):
    """A domain of the world (`file` for tasks of one's own) with its options."""

    model_config = _STRICT
    domain: str
    options: dict[str, Any] = {}


class PostTrainingRecipe(BaseModel):
    """Teachers and MOPD for `model` (a name, a folder or a .gguf file, as for chat), in the domains of `tasks`, each
    with a teacher."""

    model_config = _STRICT
    name: str
    seed: int = 0
    model: str
    tasks: dict[str, TaskSettings]
    rollouts: EngineSettings = EngineSettings()
    teachers: dict[str, GRPOSettings]
    mopd: MOPDSettings | None = None
    rivals: RivalSettings | None = None
    evaluate: EvaluateSettings = EvaluateSettings()

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if unlike := sorted(self.teachers.keys() ^ self.tasks.keys()):
            raise ValueError(f"{unlike[0]} is in one of tasks and teachers only: each domain has a teacher")
        _check_sources(self)
        for name, each in self.domains().items():
            for split in get_args(Split):
                try:
                    next(seeds(each, split))
                except ValueError as error:
                    raise ValueError(f"tasks.{name}: {error}") from None
        return self

    def domains(self) -> dict[str, Domain]:
        return {name: domain(each.domain, **each.options) for name, each in self.tasks.items()}


class TuneSettings(BaseModel):
    """Each method's `lr` is tried times each of `factors` with this `seed`, and judged by `tasks` held-out tasks of
    each domain that the comparison does not ask."""

    model_config = _STRICT
    seed: int
    factors: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)] = [0.5, 1.0, 2.0]
    tasks: Positive = 200


class CompareSettings(BaseModel):
    """All methods once with each of `seeds`, each by `tokens` that it samples itself; with each seed by other tasks."""

    model_config = _STRICT
    seeds: Annotated[list[int], Field(min_length=2)]
    tokens: Positive


class ComparisonRecipe(PostTrainingRecipe):
    """MOPD beside its rivals over several seeds, from the same `model`; the learning rates are chosen before."""

    mopd: MOPDSettings
    rivals: RivalSettings
    tune: TuneSettings
    compare: CompareSettings

    @model_validator(mode="after")
    def _seeds_differ(self) -> Self:
        every = [self.tune.seed, *self.compare.seeds]
        if twice := sorted(seed for seed in set(every) if every.count(seed) > 1):
            raise ValueError(f"the seed {twice[0]} stands twice in compare.seeds and tune.seed: give different ones")
        return self


class DraftSettings(BaseModel):
    """The first `prompts` held-out conversations' first questions, answered greedily by at most `max_tokens`."""

    model_config = _STRICT
    prompts: Positive = 64
    max_tokens: Positive = 128


class HeadsRecipe(BaseModel):
    """MTP layers for `model` (a name, a folder or a .gguf file, as for chat), from conversations that it writes with
    itself. `first` trains few layers (one, as pre-training does), `mtp` adds more and trains all (arXiv 2601.02780)."""

    model_config = _STRICT
    name: str
    seed: int = 0
    model: str
    generate: ConversationSettings
    first: HeadsSettings
    mtp: HeadsSettings
    evaluate: DraftSettings = DraftSettings()

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if self.first.layers > self.mtp.layers:
            raise ValueError(f"first.layers is {self.first.layers}, but mtp.layers {self.mtp.layers}: layers are added")
        return self


def _check_sources(recipe: Recipe | PostTrainingRecipe) -> None:
    """What is different for a domain is so for one that is there."""
    every = {f"rivals.{name}": value for name, value in recipe.rivals or ()} | {"mopd": recipe.mopd}
    every |= {f"teachers.{name}": value for name, value in (recipe.teachers or {}).items()}
    for where, settings in every.items():
        unknown = sorted(getattr(settings, "sources", {}).keys() - (recipe.teachers or {}).keys())
        if unknown:
            raise ValueError(f"{where}.sources names {unknown[0]}, which has no teacher")
    cascade, domains = recipe.rivals and recipe.rivals.cascade_rl, len(recipe.teachers or {})
    if cascade and cascade.steps < domains:
        raise ValueError(f"rivals.cascade_rl.steps is {cascade.steps}: each of {domains} domains needs one at least")


AnyRecipe = Recipe | PostTrainingRecipe | ComparisonRecipe | HeadsRecipe


def load_recipe(path: str | Path, changes: list[str] | None = None) -> AnyRecipe:
    """Reads a recipe (a .toml file, or the name of one that the package has) with `key=value` changes, where a key is
    dotted (`pretrain.tokens=1000`). `[model]` describes a new one; who names a model wants it post-trained if there are
    `teachers` (several times if there is `compare`), else MTP layers for it. Raises ValueError naming file and key."""
    file = Path(path)
    if not file.suffix and not file.exists():
        file = RECIPES / f"{path}.toml"
    try:
        raw = tomllib.loads(file.read_text())
    except UnicodeDecodeError:
        raise ValueError(f"{file}: not UTF-8 text") from None
    except OSError:
        known = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.toml")))
        raise ValueError(f"{path}: no such recipe; give a .toml file or one of {known}") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file}: not TOML: {error}") from None
    for change in changes or []:
        _set(raw, change)
    sources = raw.get("sources", {})
    for name, source in sources.items() if isinstance(sources, dict) else ():
        if isinstance(source, dict):
            source["name"] = name
    try:
        return _kind(raw).model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{file}: {'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from None


def _kind(raw: dict[str, Any]) -> type[AnyRecipe]:
    if not isinstance(raw.get("model"), str):
        return Recipe
    if "compare" in raw:
        return ComparisonRecipe
    return PostTrainingRecipe if "teachers" in raw else HeadsRecipe


def _set(raw: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"--set {change!r}: key=value is expected, such as pretrain.tokens=1000")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    *parents, last = key.strip().split(".")
    for parent in parents:
        raw = raw.setdefault(parent, {})
        if not isinstance(raw, dict):
            raise ValueError(f"--set {change!r}: {parent} is a value, not a table")
    raw[last] = value


def model_config(recipe: Recipe, tokenizer: Tokenizer) -> ModelConfig:
    """The recipe's model with the tokenizer's vocabulary (rounded up to a multiple of 64) and end tokens."""
    special = {"eos_token_id": tokenizer.special.im_end, "pad_token_id": tokenizer.special.end_of_text}
    return _config(recipe, vocab_size=-(-tokenizer.vocab_size // 64) * 64, **special)


def _config(recipe: Recipe, **fields: Any) -> ModelConfig:
    try:
        return ModelConfig(**(recipe.model | fields | {"num_nextn_predict_layers": recipe.pretrain.mtp_layers}))
    except TypeError as error:
        raise ValueError(f"model: {str(error).removeprefix('ModelConfig.__init__() ')}") from None
