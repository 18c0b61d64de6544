"""A training stage: its settings, and the loop that pre-training and fine-tuning share."""

import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from mimoflash.checkpoint import load_training_state, save_training_state
from mimoflash.data import Batch, PackedLoader, Prepared
from mimoflash.model import Transformer
from mimoflash.train.evaluate import held_out_losses
from mimoflash.train.losses import language_model_loss
from mimoflash.train.monitor import Monitor, fastest_dtype, matmul_peak
from mimoflash.train.optimizer import batch_size, learning_rate
from mimoflash.train.settings import check_least, check_rates
from mimoflash.train.trainer import Trainer


@dataclass(frozen=True)
class StageSettings:
    """A stage of training. Token counts include padding; `mixture` gives each source's share of the rows.

    The learning rate is linear over `warmup_tokens`, constant over `constant_tokens`, then a cosine to `final_lr`.
    `batch` rows a step, from `first_batch` on over `batch_warmup_tokens`; `micro_batch` rows at a time. `prompt_weight`
    is the loss weight of what the assistant does not write in a conversation. `precision`: "auto" takes bfloat16 where
    the machine multiplies it faster.
    """

    tokens: int
    mixture: dict[str, float]
    sequence_length: int
    batch: int
    peak_lr: float
    final_lr: float
    warmup_tokens: int = 0
    constant_tokens: int = 0
    first_batch: int = 0
    batch_warmup_tokens: int = 0
    micro_batch: int = 16
    prompt_weight: float = 0.0
    mtp_layers: int = 1
    mtp_weight: float = 0.3
    balance_weight: float = 1e-5
    expert_bias_step: float = 1e-3
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    save_every: int = 100  # steps
    evaluate_rows: int = 32  # of each held-out source
    precision: str = "auto"

    def __post_init__(self) -> None:
        check_least(self, 1, "tokens", "batch", "micro_batch", "save_every", "evaluate_rows")
        check_least(self, 0, "warmup_tokens", "constant_tokens", "batch_warmup_tokens", "first_batch", "mtp_layers")
        check_rates(self.peak_lr, self.final_lr)
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length is {self.sequence_length}: a row needs two tokens at least")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}; it must be one of {', '.join(PRECISIONS)}")

    def plan(self) -> list["Step"]:
        """Every step of the stage, known before it starts."""
        steps: list[Step] = []
        tokens = sample = 0
        while tokens < self.tokens:
            rows = batch_size(
                tokens, first=self.first_batch or self.batch, full=self.batch, warmup_tokens=self.batch_warmup_tokens
            )
            tokens += rows * self.sequence_length
            lr = learning_rate(
                tokens, peak=self.peak_lr, final=self.final_lr, warmup_tokens=self.warmup_tokens,
                constant_tokens=self.constant_tokens, total_tokens=self.tokens,
            )
            steps.append(Step(sample, rows, tokens, lr))
            sample += rows
        return steps


PRECISIONS: dict[str, torch.dtype | None] = {"auto": None, "float32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Step:
    """Rows `first_sample` .. `first_sample + rows` at learning rate `lr`; `tokens` counts up to and with this step."""

    first_sample: int
    rows: int
    tokens: int
    lr: float


@dataclass
class StageResult:
    steps: int
    tokens: int
    seconds: float
    loss: float
    expert_load: list[list[float]]  # tokens that each expert of each MoE layer took in the last tenth of the steps
    held_out: dict[str, dict[str, float]]


def train_stage(model: Transformer, data: Prepared, settings: StageSettings, folder: Path, name: str) -> StageResult:
    """Trains `model` in place and returns how it went; goes on from the newest training state in `folder`, if any.

    Raises ValueError, naming the step and the last good checkpoint, when the loss is no longer finite.
    """
    plan = settings.plan()
    loader = PackedLoader(
        data.train, settings.mixture, settings.sequence_length, seed=settings.seed, prompt_weight=settings.prompt_weight
    )
    for source, packing in loader.packing.items():
        if packing.truncated_conversations:
            warnings.warn(
                f"{name}: {packing.truncated_conversations} conversations of {source} are longer than sequence_length "
                f"{settings.sequence_length} and lose their ends", stacklevel=2,
            )
    states = folder / "states"
    resumed = load_training_state(states, model.lm_head.weight.device)
    done, state = (0, None) if resumed is None else resumed
    if done >= len(plan):
        raise ValueError(f"{states} is at step {done} but the stage has {len(plan)} steps: give another folder")
    device = model.lm_head.weight.device
    dtype = PRECISIONS[settings.precision] or fastest_dtype(device.type)
    if state is not None:
        dtype = getattr(torch, state["dtype"])  # a machine may decide otherwise; a run must not change midway
    trainer = Trainer(
        model, weight_decay=settings.weight_decay, clip=settings.clip, expert_bias_step=settings.expert_bias_step,
        dtype=dtype,
    )
    spent = 0.0
    if state is not None:
        trainer.load_state(state["trainer"])
        spent = state["seconds"]
    loss_fn = partial(language_model_loss, mtp_weight=settings.mtp_weight, balance_weight=settings.balance_weight)
    speed = _Speed(model, settings.sequence_length, dtype)
    started = time.monotonic() - spent
    first_tokens = plan[done - 1].tokens if done else 0

    def save(step: int) -> None:
        elapsed = time.monotonic() - started
        save_training_state(
            states, step, {"trainer": trainer.state(), "seconds": elapsed, "dtype": str(dtype).removeprefix("torch.")}
        )

    load = torch.zeros(len(model.config.moe_layers), model.config.n_routed_experts, device=device)
    with Monitor(folder, name, plan[-1].tokens, first_step=done, done=first_tokens) as monitor:
        batches = loader.batches(plan[done].first_sample, [step.rows for step in plan[done:]])
        for number, (step, batch) in enumerate(zip(plan[done:], batches, strict=True), done + 1):
            begin = time.perf_counter()
            try:
                metrics = trainer.step(list(split(batch, settings.micro_batch, device)), loss_fn, step.lr)
            except FloatingPointError as error:
                raise ValueError(
                    f"{name} step {number}: {error}; begin again with a lower peak_lr or clip. The last good "
                    f"checkpoint stands in {states}"
                ) from None
            metrics |= {"lr": step.lr} | speed(batch.tokens.numel(), time.perf_counter() - begin)
            monitor.log(number, step.tokens, metrics)
            if trainer.expert_counts is not None and number > 0.9 * len(plan):
                load += trainer.expert_counts
            if number % settings.save_every == 0 and number < len(plan):
                save(number)
        held_out = held_out_losses(model, data, settings.sequence_length, rows=settings.evaluate_rows)
        monitor.log(len(plan), plan[-1].tokens, {f"held_out/{source}": v["loss"] for source, v in held_out.items()})
    elapsed = time.monotonic() - started
    return StageResult(len(plan), plan[-1].tokens, elapsed, metrics["loss"], load.tolist(), held_out)


def split(batch: Batch, rows: int, device: torch.device | str = "cpu") -> Iterator[Batch]:
    """Micro-batches of at most `rows` rows, on the device."""
    for start in range(0, batch.tokens.shape[0], rows):
        yield batch.rows(start, start + rows).to(device)


class _Speed:
    """Tokens a second, and the share of the machine's matmul peak that the model's own arithmetic takes (MFU)."""

    def __init__(self, model: Transformer, length: int, dtype: torch.dtype):
        layers = len(model.model.mtp.layers)
        self.flops = 3 * model.config.flops_per_token(length, mtp_layers=layers)
        self.peak = matmul_peak(dtype, model.lm_head.weight.device.type)

    def __call__(self, tokens: int, seconds: float) -> dict[str, float]:
        rate = tokens / seconds
        return {"tokens_per_second": rate, "mfu": rate * self.flops / self.peak}
