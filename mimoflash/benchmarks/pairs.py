"""Sides in turn: each a process that sleeps while another works; medians, ratios of pairs, the machine, the JSON."""

import contextlib
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import torch

from mimoflash.kernels import native

REST = 0.1  # seconds between two sides, in which the threads of the one that has ended go from spinning to sleep


class Side:
    """A process, `python -m MODULE SETTINGS`, that answers lines of JSON by lines of JSON (see `answer_requests`)."""

    def __init__(self, module: str, **settings: Any):
        self.name = str(settings["side"])
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(settings)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
        )
        self.requests, self.replies = cast(IO[str], self.process.stdin), cast(IO[str], self.process.stdout)

    def ask(self, **request: Any) -> dict[str, Any]:
        """What the process answers. Raises ValueError, with what it says, where it failed."""
        with contextlib.suppress(BrokenPipeError):
            self.requests.write(json.dumps(request) + "\n")
            self.requests.flush()
        answer = self.replies.readline()
        if not answer:
            self.process.wait()
            self.errors.seek(0)
            raise ValueError(f"the {self.name} side failed:\n{self.errors.read().strip()[-2000:]}")
        return json.loads(answer)

    def __enter__(self) -> "Side":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.requests.close()  # its loop ends
        if kind is not None:
            self.process.kill()
        self.process.wait()
        self.replies.close()
        self.errors.close()


def answer_requests(open_side: Callable[[dict[str, Any]], Callable[..., dict[str, Any]]]) -> None:
    """The process behind a `Side`: `open_side(settings)` gives the function that answers, until standard input ends.
    What libraries print goes to standard error."""
    replies = sys.stdout
    sys.stdout = sys.stderr
    answer = open_side(json.loads(sys.argv[1]))
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), file=replies, flush=True)


def run_in_turn(
    measures: Mapping[str, Callable[[int], dict[str, Any]]], pairs: int, say: Callable[[str], None], unit: str
) -> dict[str, list[dict[str, Any]]]:
    """Every measure `pairs` times, one after the other; each is given the pair's number and answers with a `rate` at
    least. Who begins changes from pair to pair, so that a drift of the machine hurts both. A line for each pair is
    said; "ours" and "peer" are compared in it."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in measures}
    for pair in range(pairs):
        for name, measure in list(measures.items())[:: 1 if pair % 2 == 0 else -1]:
            time.sleep(REST)
            results[name].append(measure(pair))
        rates = {name: results[name][-1]["rate"] for name in measures}
        line = "  ".join(f"{name} {rate:,.1f}" for name, rate in rates.items())
        if "peer" in rates:
            line += f"  ratio {rates['ours'] / rates['peer']:.2f}"
        say(f"{pair + 1}/{pairs}  {line} {unit}")
    return results


def compare(ours: list[dict[str, Any]], peer: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of both sides' rates, and of their ratio pair by pair, with the smallest and largest."""
    ratios = [a["rate"] / b["rate"] for a, b in zip(ours, peer, strict=True)] if peer else []
    return {
        "ours": statistics.median(one["rate"] for one in ours),
        "peer": statistics.median(one["rate"] for one in peer) if peer else None,
        "ratio": statistics.median(ratios) if ratios else None,
        "spread": [min(ratios), max(ratios)] if ratios else None,
    }


def described(figures: Mapping[str, Any], peer: str | None) -> str:
    """The figures of `compare` in a line."""
    line = f"median: {figures['ours']:,.1f} {figures['unit']}"
    if figures["ratio"] is None:
        return line
    low, high = figures["spread"]
    return f"{line}, {figures['ratio']:.2f} x {peer} ({low:.2f} to {high:.2f}), which has {figures['peer']:,.1f}"


def machine() -> dict[str, Any]:
    """What the figures were measured on. `kernels`: the instruction set of ours; None: there are none, all ran on
    PyTorch."""
    kernels = native.instruction_sets()[-1] if native.available() else None
    return {
        "processor": _processor(), "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__,
        "kernels": kernels,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def write_results(results: Sequence[Mapping[str, Any]], file: Path | None) -> None:
    """The result, or a list of them where there are several, into the file, if there is one."""
    if file is not None:
        file.write_text(json.dumps(results[0] if len(results) == 1 else results, indent=2) + "\n")


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for weights, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="mimoflash-bench-") as folder:
        yield Path(folder)
