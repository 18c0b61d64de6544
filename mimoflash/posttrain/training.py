"""What GRPO and MOPD share: rollouts by the policy as it is, optimizer steps on them, and a run that can be resumed."""

import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from mimoflash.checkpoint import load_training_state, save_training_state
from mimoflash.engine import Engine, SamplingParams
from mimoflash.model import Transformer
from mimoflash.posttrain.batch import RolloutBatch, Sample, filter_empty, make_batch, micro_batches
from mimoflash.posttrain.groups import Group, check_not_all_broken
from mimoflash.posttrain.journal import Journal
from mimoflash.posttrain.losses import Metrics, rollout_drift
from mimoflash.posttrain.policy import score
from mimoflash.posttrain.rollout import Rollout, tokenizer_of
from mimoflash.posttrain.scheduler import DataScheduler, LocalPlayer, Player, Source
from mimoflash.train import LossOutput, Trainer, add_lora, merge_lora, save_lora
from mimoflash.train.monitor import Monitor
from mimoflash.train.settings import check_least
from mimoflash.world import Domain

Item = TypeVar("Item")
_MAY_CHANGE = ("steps", "tokens", "save_every", "drift_every")  # of a run that is gone on with
Log = Callable[[int, int, Metrics], None]  # of a step: its number, tokens sampled so far, metrics


@dataclass(frozen=True)
class SourceSettings:
    """What is different for one domain; None: as for all."""

    groups: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    priority: int = 0

    def __post_init__(self) -> None:
        for name in ("groups", "max_tokens", "temperature"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} is {value}: it must be above 0")


@dataclass(frozen=True)
class RolloutSettings:
    """`steps` of: `groups` tasks (of each domain), each played `group_size` times, and `updates` optimizer steps on
    them, on a part of the rollouts each, at a rate that rises to `lr` over `warmup` steps. `tokens`: no further step
    once so many have been sampled (0: no limit). A turn has `max_tokens` at most, a task `max_turns`, an environment
    `timeout` seconds for an answer and `retries` more attempts. No more than `micro_tokens` are in one forward pass.
    `mtp_weight`: of the MTP layers' loss on the same tokens, which moves nothing but these layers. Tasks are taken from
    seed `first_task` on.

    Rollouts are drawn at `temperature` 1 from the whole vocabulary: there the policy that samples is the one trained.
    `max_staleness`, `partial_share`: see DataScheduler; above 0, rollouts go on while a step is taken.
    `lora_rank`: above 0, low-rank adapters are trained, and merged at the end; a rate ten times as high suits them.
    `sources`: what is different for a domain. The state is saved every `save_every` steps. Every `drift_every` steps
    (0: never) it is measured how far trainer and engine would be apart without the replay of routes.
    """

    steps: int
    lr: float
    groups: int = 8
    group_size: int = 8
    updates: int = 1
    warmup: int = 0
    tokens: int = 0
    max_tokens: int = 256
    max_turns: int = 4
    temperature: float = 1.0
    thinking: bool = True
    timeout: float = 60.0
    retries: int = 0
    micro_tokens: int = 8192
    mtp_weight: float = 0.0
    lora_rank: int = 0
    max_staleness: int = 0
    partial_share: float = 1.0
    first_task: int = 0
    save_every: int = 10
    drift_every: int = 0
    sources: Mapping[str, SourceSettings] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, 1, "steps", "groups", "group_size", "updates", "max_tokens", "max_turns", "micro_tokens")
        check_least(self, 1, "save_every")
        check_least(self, 0, "warmup", "tokens", "retries", "mtp_weight", "max_staleness", "drift_every", "first_task")
        check_least(self, 0, "lora_rank", "seed")
        if self.lora_rank and self.mtp_weight:
            raise ValueError(f"mtp_weight is {self.mtp_weight}: beside adapters (lora_rank) MTP layers stay, give 0")
        for name in ("lr", "temperature", "timeout"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0")
        if not 0 <= self.partial_share <= 1:
            raise ValueError(f"partial_share is {self.partial_share}: a share from 0 to 1 is needed")

    def source(self, name: str, domain: Domain) -> Source:
        own = self.sources.get(name, SourceSettings())
        params = SamplingParams(
            max_tokens=own.max_tokens or self.max_tokens, temperature=own.temperature or self.temperature
        )
        return Source(
            domain, own.groups or self.groups, params, self.max_turns, self.thinking, self.timeout, own.priority
        )


class Training:
    """Within `with`, for each of its steps: `groups` are the rollouts, `update` takes the optimizer steps and gives the
    rollouts the new weights. The engine's model has them at the end.

    With a `folder` the state and what has been played are kept there, and training goes on from them. `player`: who
    plays, if not the engine. Raises ValueError where settings name a domain that is not there, or the folder holds a
    run with other ones.
    """

    def __init__(
        self, engine: Engine, domains: Mapping[str, Domain], settings: RolloutSettings, log: Log | None = None, *,
        folder: Path | None = None, player: Player | None = None,
    ):
        if unknown := sorted(settings.sources.keys() - domains.keys()):
            raise ValueError(f"sources names {unknown[0]}, but the domains are {', '.join(sorted(domains))}")
        tokenizer_of(engine)
        if folder is not None:
            _check_same_settings(folder / "states" / "settings.json", settings)
        self.engine, self.settings, self.log, self.folder = engine, settings, log, folder
        # while rollouts go on, their weights must stay as they are
        apart = settings.max_staleness > 0
        self.model = copy.deepcopy(engine.model) if apart else engine.model
        if settings.lora_rank:
            add_lora(self.model, settings.lora_rank)
        self.trainer = make_trainer(self.model)
        self.scheduler = DataScheduler(
            player or LocalPlayer(engine, domains),
            {name: settings.source(name, domain) for name, domain in domains.items()},
            steps=settings.steps, group_size=settings.group_size, seed=settings.seed, first_task=settings.first_task,
            max_staleness=settings.max_staleness, partial_share=settings.partial_share, retries=settings.retries,
            journal=Journal(folder / "states" / "rollouts.jsonl") if folder else None,
        )
        self.tokens, self._step = 0, 0
        self._metrics: Metrics = {}
        self._monitor: Monitor | None = None

    def __enter__(self) -> "Training":
        self._load()
        with ExitStack() as stack:
            stack.callback(self._hand_over)
            if self.folder is not None:
                monitor = Monitor(
                    self.folder, self.folder.name, self.settings.steps, first_step=self._step, done=self._done
                )
                self._monitor = stack.enter_context(monitor)
            stack.enter_context(self.scheduler)
            self.scheduler.begin(self.model)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _hand_over(self) -> None:
        """The engine's model is a plain one with the newest weights."""
        if self.settings.lora_rank:
            if self.folder is not None:
                save_lora(self.model, self.folder / "lora.safetensors")
            merge_lora(self.model)
        self.engine.update_weights(None if self.model is self.engine.model else self.model.state_dict())

    def __iter__(self) -> Iterator[int]:
        """The numbers of the steps, from 1 on."""
        settings = self.settings
        while self._step < settings.steps and not 0 < settings.tokens <= self.tokens:
            self._step += 1
            yield self._step

    @property
    def _done(self) -> float:
        """In steps: whichever bound comes first, that of the steps or that of the tokens, says how far it is."""
        settings = self.settings
        return max(self._step, settings.steps * self.tokens / settings.tokens if settings.tokens else 0)

    def groups(self) -> dict[str, list[Group]]:
        """This step's, by domain. Raises ValueError where the engine fails."""
        begin = time.monotonic()
        try:
            taken = self.scheduler.take()
        except RuntimeError as error:
            raise ValueError(
                f"step {self._step}: {error}. If training has led the weights astray, begin again with a lower lr than "
                f"{self.settings.lr}"
            ) from None
        for name, groups in taken.items():
            check_not_all_broken([rollout for group in groups for rollout in group], name)
        rollouts = [rollout for groups in taken.values() for group in groups for rollout in group]
        self.tokens += sum(end - start for rollout in rollouts for start, end in rollout.turns)
        ages = [max(self.scheduler.version - rollout.versions[0], 0) for rollout in rollouts]
        self._metrics = {"seconds/rollouts": time.monotonic() - begin}
        if self.settings.drift_every and self._step % self.settings.drift_every == 0:
            self._metrics |= self._free_drift(rollouts)
        if self.settings.max_staleness:
            several = sum(rollout.versions[0] != rollout.versions[1] for rollout in rollouts)
            self._metrics |= {
                "partial/avg_staleness": sum(ages) / len(ages), "partial/share": several / len(rollouts),
                "partial/restarted": float(self.scheduler.restarted),
            }
        return taken

    def _free_drift(self, rollouts: Sequence[Rollout]) -> Metrics:
        """What the drift from the rollout engine would be, did the trainer choose its own experts."""
        batches = self.batches([Sample(rollout, 0.0) for rollout in filter_empty(rollouts)])
        found = [
            (batch.own_tokens, rollout_drift(logp_BT, batch.rollout_logp_BT, batch.mask_BT))
            for batch, logp_BT in zip(batches, score(self.model, batches, replay=False), strict=True)
        ]
        total = sum(tokens for tokens, _ in found)
        return {
            f"{name}/without_replay": sum(tokens * drift[name] for tokens, drift in found) / total
            for name in (found[0][1] if found else ())
        }

    def batches(self, samples: Sequence[Sample]) -> list[RolloutBatch]:
        """For the model, each of at most `micro_tokens`."""
        device = self.model.lm_head.weight.device
        parts = micro_batches(samples, self.settings.micro_tokens)
        return [make_batch(part, self.model.config, device) for part in parts]

    def update(
        self, parts: Sequence[Sequence[Item]], loss_fn: Callable[[Transformer, Item], LossOutput], metrics: Metrics
    ) -> None:
        """An optimizer step on each part that is not empty; then the rollouts go on with the new weights, and `metrics`
        and the steps' own are logged. Raises ValueError where the loss is no longer finite."""
        begin = time.monotonic()
        lr = self.settings.lr * min(1.0, self._step / max(self.settings.warmup, 1))
        steps = [self._update(items, loss_fn, lr) for items in parts if items]
        own = {name: sum(step[name] for step in steps) / len(steps) for name in (steps[0] if steps else {})}
        self.scheduler.update(self.model)
        everything = metrics | own | self._metrics | {"seconds/update": time.monotonic() - begin}
        if self.log is not None:
            self.log(self._step, self.tokens, everything)
        if self._monitor is not None:
            self._monitor.log(self._step, self.tokens, everything, done=self._done)
        if self.folder is not None and self._step % self.settings.save_every == 0:
            self._save()

    def _update(
        self, items: Sequence[Item], loss_fn: Callable[[Transformer, Item], LossOutput], lr: float
    ) -> Metrics:
        try:
            metrics = self.trainer.step(items, loss_fn, lr)
        except FloatingPointError as error:
            raise ValueError(f"step {self._step}: {error}; begin again with a lower lr than {lr}") from None
        metrics["actor/num_zeros_in_grad"] = metrics.pop("num_zeros")
        metrics["actor/grad_norm"] = metrics.pop("grad_norm")
        return metrics

    def _save(self) -> None:
        assert self.folder is not None
        state = {"trainer": self.trainer.state(), "scheduler": self.scheduler.state(), "tokens": self.tokens}
        save_training_state(self.folder / "states", self._step, state)
        self.scheduler.forget_taken()

    def _load(self) -> None:
        found = load_training_state(self.folder / "states", self.model.lm_head.weight.device) if self.folder else None
        if found is None:
            return
        self._step, state = found
        self.tokens = state["tokens"]
        self.trainer.load_state(state["trainer"])
        self.scheduler.load_state(state["scheduler"])


def _check_same_settings(file: Path, settings: RolloutSettings) -> None:
    """What has been played belongs to the settings that it was played by."""
    described = json.loads(json.dumps(asdict(settings)))
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(described))
        temporary.replace(file)
        return
    stored = json.loads(file.read_text())
    changed = [name for name in described if name not in _MAY_CHANGE and stored.get(name) != described[name]]
    if changed:
        was = stored.get(changed[0])
        raise ValueError(f"{file.parent.parent} holds a run whose {changed[0]} is {was}: give that, or another folder")


def make_trainer(model: Transformer) -> Trainer[Transformer]:
    """In the dtype that the model has. The experts' correction biases stay: a step on them would choose other experts
    than those that were sampled with."""
    return Trainer(model, weight_decay=0.0, dtype=model.lm_head.weight.dtype)


def sampling_policy(model: Transformer, batches: Sequence[RolloutBatch], updates: int) -> Sequence[Tensor | None]:
    """The log-probabilities of the policy that sampled, before the first of several updates moves it. None for a single
    update: its own forward pass gives them."""
    return [None] * len(batches) if updates == 1 else score(model, batches, replay=True)
