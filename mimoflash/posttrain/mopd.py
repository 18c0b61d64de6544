"""MOPD: one student learns from the teachers of several domains, on what it writes itself (arXiv 2601.02780, section
4.3; 2606.30406)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from mimoflash.engine import Engine
from mimoflash.model import Transformer
from mimoflash.posttrain.batch import RolloutBatch, Sample, make_batch, micro_batches
from mimoflash.posttrain.groups import (
    Group,
    GroupSettings,
    Log,
    deal,
    group_metrics,
    make_trainer,
    play_groups,
    samples_of,
    sampling_policy,
    sound,
    tokenizer_of,
    update,
)
from mimoflash.posttrain.losses import Metrics, mopd_loss, rollout_drift
from mimoflash.posttrain.policy import score, token_logp
from mimoflash.text import Tokenizer
from mimoflash.train import LossOutput
from mimoflash.world import Domain, seeds


@dataclass(frozen=True)
class Teacher:
    """A model with the tokenizer that it was trained with."""

    model: Transformer
    tokenizer: Tokenizer


@dataclass(frozen=True, kw_only=True)
class MOPDSettings(GroupSettings):
    """`alpha`: how much the group-normalised reward counts beside the teacher's log-probability. `gate`: tokens whose
    probability under the trainer is less or more than this much of the rollout engine's teach nothing."""

    alpha: float
    gate: tuple[float, float] = (0.2, 5.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0:
            raise ValueError(f"alpha is {self.alpha}: 0 or more is needed")
        if not 0 <= self.gate[0] < 1 < self.gate[1]:
            raise ValueError(f"gate is {self.gate}: the first must be below 1, the second above")


@dataclass(frozen=True)
class _Item:
    batch: RolloutBatch
    old_logp_BT: Tensor | None  # see sampling_policy
    teacher_logp_BT: Tensor
    share: float  # of its domain's sequences in this step


def train_mopd(
    engine: Engine, domains: Mapping[str, Domain], teachers: Mapping[str, Teacher], settings: MOPDSettings, log: Log
) -> None:
    """Trains the engine's model in place on the training tasks of all domains, each of them with the same share of the
    loss, however many rollouts and tokens it has.

    Raises ValueError, before anything starts, where teachers and domains do not go together or a teacher does not
    speak the student's tokens; and where the loss is no longer finite.
    """
    check_teachers(engine, domains, teachers)
    model, trainer = engine.model, make_trainer(engine.model)
    tasks = {name: seeds(domain, "train", settings.first_task) for name, domain in domains.items()}
    tokens = 0
    for step in range(1, settings.steps + 1):
        groups = {name: play_groups(engine, domains[name], tasks[name], settings, step) for name in domains}
        samples = {name: [s for group in groups[name] for s in samples_of(sound(group))] for name in domains}
        dealt = {name: deal(samples[name], settings.updates, step) for name in domains}
        parts = [
            [item for name in domains for item in _items(dealt[name][number], model, teachers[name].model, settings)]
            for number in range(settings.updates)
        ]
        metrics = update(trainer, parts, partial(_loss, settings=settings), settings.lr)
        engine.update_weights()

        tokens += sum(int(item.batch.own_tokens) for items in parts for item in items)
        log(step, tokens, _metrics(groups) | metrics)


def check_teachers(engine: Engine, domains: Mapping[str, Domain], teachers: Mapping[str, Teacher]) -> None:
    """Raises ValueError where a domain has no teacher or a teacher no domain, and for a teacher that has other tokens
    than the student, ends its turns by others, or is the student itself."""
    tokenizer = tokenizer_of(engine)
    if not domains:
        raise ValueError("there is no domain to distil in: give one at least")
    if missing := sorted(domains.keys() - teachers.keys()):
        raise ValueError(f"no teacher for {', '.join(missing)}: give each domain one")
    if unknown := sorted(teachers.keys() - domains.keys()):
        raise ValueError(f"a teacher for {', '.join(unknown)}, but the domains are {', '.join(sorted(domains))}")
    for name, teacher in teachers.items():
        if teacher.model is engine.model:
            raise ValueError(f"the teacher of {name} is the student and would move with it: give a copy of the model")
        if teacher.tokenizer.fingerprint != tokenizer.fingerprint:
            raise ValueError(f"the teacher of {name} has another tokenizer than the student: its scores would be noise")
        theirs, ours = teacher.model.config.vocab_size, engine.model.config.vocab_size
        if theirs != ours:
            raise ValueError(f"the teacher of {name} has a vocabulary of {theirs}, the student one of {ours}")
        theirs_end, ours_end = _end_tokens(teacher.model, teacher.tokenizer), _end_tokens(engine.model, tokenizer)
        if theirs_end != ours_end:
            raise ValueError(
                f"the teacher of {name} ends its turns by tokens {sorted(theirs_end)}, the student by "
                f"{sorted(ours_end)}: answers would grow without end"
            )


def _end_tokens(model: Transformer, tokenizer: Tokenizer) -> set[int]:
    eos = model.config.eos_token_id
    return {*tokenizer.stop_ids, *((eos,) if isinstance(eos, int) else eos or ())}


def _items(
    samples: Sequence[Sample], model: Transformer, teacher: Transformer, settings: MOPDSettings
) -> list[_Item]:
    """Of one domain. The teacher routes freely: the student's routes say nothing of its experts."""
    device = model.lm_head.weight.device
    parts = list(micro_batches(samples, settings.micro_tokens))
    batches = [make_batch(part, model.config, device) for part in parts]
    old_logps = sampling_policy(model, batches, settings.updates)
    teacher_logps = score(teacher, batches, replay=False)
    shares = [len(part) / len(samples) for part in parts]
    return [_Item(*each) for each in zip(batches, old_logps, teacher_logps, shares, strict=True)]


def _loss(model: Transformer, item: _Item, settings: MOPDSettings) -> LossOutput:
    """Weighted by the share of its domain, so that every domain weighs 1."""
    batch = item.batch
    logp_BT = token_logp(model, batch, replay=True)
    own_logp_BT = logp_BT.detach()
    loss, metrics = mopd_loss(
        logp_BT, own_logp_BT, batch.rollout_logp_BT, item.teacher_logp_BT, batch.outcome_B, batch.mask_BT,
        alpha=settings.alpha, gate=settings.gate,
    )
    reverse_kl = (own_logp_BT - item.teacher_logp_BT).sum().item() / batch.own_tokens  # both are 0 outside of the mask
    metrics |= {"loss": loss.item(), "mopd/reverse_kl": reverse_kl}
    old_logp_BT = own_logp_BT if item.old_logp_BT is None else item.old_logp_BT
    metrics |= rollout_drift(old_logp_BT, batch.rollout_logp_BT, batch.mask_BT)
    return LossOutput(loss * item.share, item.share, metrics)


def _metrics(groups: Mapping[str, Sequence[Group]]) -> Metrics:
    """Of all domains together, and of each under its name."""
    metrics = group_metrics([group for each in groups.values() for group in each])
    for name, each in groups.items():
        metrics |= {f"{name}/{metric}": value for metric, value in group_metrics(each).items()}
    return metrics
