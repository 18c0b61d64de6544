"""Linear layers out of cache: the compiled kernels by kind of weight and rows, beside PyTorch's and a mere read.

`python -m mimoflash.benchmarks.linear [threads]` prints a table. A weight of 1024 inputs takes 64 MB or more of memory,
which no cache of the common ones holds; "read" goes over the same bytes and does nothing with them.
"""

import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mimoflash.kernels import native
from mimoflash.kernels.quantize import Quantised, quantise

INPUTS = 1024
BYTES = 1 << 26
ROWS = (1, 2, 4, 8, 16, 64, 256)
BITS = {"float32": 32, "bfloat16": 16, "int8": 8.5, "int4": 5}


def make_weight(kind: str) -> Tensor | Quantised:
    outputs = int(BYTES * 8 / BITS[kind] / INPUTS)
    weight = torch.randn(outputs, INPUTS)
    return quantise(weight, kind) if kind in ("int8", "int4") else weight.to(getattr(torch, kind))


def seconds(run: Callable[[], object], budget: float = 0.7) -> float:
    """The best of as many runs as `budget` seconds hold: what else a machine does makes a run longer, never shorter."""
    run()
    best, end = float("inf"), time.perf_counter() + budget
    while time.perf_counter() < end:
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
    return best


def measure(kind: str, threads: int) -> list[str]:
    weight, kernels = make_weight(kind), native.library()
    assert kernels is not None
    data = weight.data if isinstance(weight, Quantised) else weight
    read = seconds(lambda: kernels.mf_read(data.data_ptr(), data.nbytes, threads))
    lines = [f"{kind:9}      read {data.nbytes / read / 1e9:6.1f} GB/s"]
    for rows in ROWS:
        x = torch.randn(rows, INPUTS)
        ours = seconds(lambda x=x: native.linear(x, [weight], threads=threads))  # type: ignore[misc]
        operations = 2 * rows * data.shape[0] * INPUTS
        if isinstance(weight, Quantised):
            operations = 2 * rows * weight.n * weight.k
        line = f"{kind:9} {rows:4} rows {weight.nbytes / ours / 1e9:6.1f} GB/s {operations / ours / 1e9:7.1f} GFLOP/s"
        if isinstance(weight, Tensor):
            theirs = seconds(lambda x=x: F.linear(x.to(weight.dtype), weight))  # type: ignore[misc]
            line += f"   F.linear {weight.nbytes / theirs / 1e9:6.1f} GB/s {operations / theirs / 1e9:7.1f} GFLOP/s"
        lines.append(line)
    return lines


def main() -> None:
    threads = int(sys.argv[1]) if len(sys.argv) > 1 else torch.get_num_threads()
    torch.set_num_threads(threads)
    if not native.available():
        sys.exit("there is nothing to measure")
    print(f"{native.instruction_sets()[-1]}, {threads} threads, {INPUTS} inputs")
    for kind in native.KINDS:
        print(*measure(kind, threads), sep="\n", flush=True)


if __name__ == "__main__":
    main()
