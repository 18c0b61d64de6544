"""What a run shows while it trains (progress bar, metrics.jsonl, TensorBoard), and the machine's peak beside it."""

import functools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter


@functools.cache
def matmul_peak(dtype: torch.dtype = torch.float32, device: str = "cpu", size: int = 2048) -> float:
    """FLOP/s of a square matmul: the best of a few, within about a second."""
    a = torch.ones(size, size, dtype=dtype, device=device)
    best, end = float("inf"), time.perf_counter() + 1.0
    while True:
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() > end:
            return 2 * size**3 / best


def fastest_dtype(device: str = "cpu") -> torch.dtype:
    """bfloat16 where the machine multiplies it clearly faster than float32. A small matrix decides: where bfloat16 is
    emulated, a large one takes minutes."""
    faster = matmul_peak(torch.bfloat16, device, 256) > 1.3 * matmul_peak(torch.float32, device, 256)
    return torch.bfloat16 if faster else torch.float32


SHOWN = {
    "loss": "loss {:.3f}", "dynsam/avg@n": "reward {:.2f}", "mopd/reverse_kl": "reverse KL {:.3f}",
    "tokens_per_second": "{:,.0f} tok/s", "mfu": "MFU {:.0%}",
}


class Monitor:
    """Progress and logs of one stage, in its folder; `total` is in whatever progress is counted. A resumed stage drops
    the lines after the step it goes on from."""

    def __init__(self, folder: Path, name: str, total: float, *, first_step: int = 0, done: float = 0):
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "metrics.jsonl"
        self._forget_after(first_step)
        self.log_file = self.file.open("a")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        self.console = Console()
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}"), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), console=self.console, disable=not self.console.is_terminal,
        )
        self.name, self.total, self.printed = name, total, time.monotonic()
        self.task = self.progress.add_task(name, total=total, completed=int(done), status="")
        self.started, self.first = time.monotonic(), done
        self.progress.start()

    def log(self, step: int, tokens: int, metrics: dict[str, float], *, done: float | None = None) -> None:
        """One step, after which `done` of the total is done (the tokens, if not given)."""
        self.log_file.write(json.dumps({"step": step, "tokens": tokens, **metrics}) + "\n")
        self.log_file.flush()
        for name, value in metrics.items():
            self.board.add_scalar(name, value, step)
        status = "  ".join(shown.format(metrics[name]) for name, shown in SHOWN.items() if name in metrics)
        if not status:
            return
        done = tokens if done is None else done
        self.progress.update(self.task, completed=int(done), status=status)
        if not self.console.is_terminal and time.monotonic() - self.printed > 15:  # a log file gets a line now and then
            self.printed = time.monotonic()
            left = (self.printed - self.started) / max(1, done - self.first) * (self.total - done)
            self.console.print(f"{self.name} {done / self.total:4.0%}  {status}  {left:.0f} s left", highlight=False)

    def close(self) -> None:
        self.progress.stop()
        self.log_file.close()
        self.board.close()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _forget_after(self, step: int) -> None:
        kept = [line for line in read_metrics(self.file) if line["step"] <= step] if step else []
        rewritten = self.file.with_suffix(".tmp")
        rewritten.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(rewritten, self.file)


def read_metrics(file: Path) -> Iterator[dict[str, float]]:
    """The lines of a metrics.jsonl; a last line that a killed run left unfinished is passed over."""
    if not file.exists():
        return
    for line in file.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return
