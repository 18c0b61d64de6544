"""What a window layer saves: time and memory of attention at growing lengths, window against global.

`python -m mimoflash.benchmarks.attention` prints a table; each cell is a process of its own, so that memory is its own.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from mimoflash.config import GLOBAL, WINDOW, ModelConfig
from mimoflash.kernels.attention import attention

NANO = Path(__file__).parent / "shapes" / "nano.json"
LENGTHS = (1024, 4096, 16_384)


def measure(kind: str, length: int, *, training: bool) -> dict[str, float]:
    """Seconds (best of three) and bytes of memory beyond the inputs, of one layer of the nano shape, one sequence."""
    shape = ModelConfig.load(NANO).attention(kind)
    q = torch.randn(1, length, shape.heads, shape.head_dim, requires_grad=training)
    k = torch.randn(1, length, shape.kv_heads, shape.head_dim, requires_grad=training)
    v = torch.randn(1, length, shape.kv_heads, shape.v_head_dim, requires_grad=training)
    sink = torch.zeros(shape.heads, requires_grad=training) if shape.sink else None

    def run(upto: int) -> None:
        with torch.set_grad_enabled(training):
            out = attention(q[:, :upto], k[:, :upto], v[:, :upto], window=shape.window, sink=sink)
        if training:
            out.sum().backward()

    run(64)  # libraries allocate their own on first use
    before = _peak_memory()
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        run(length)
        seconds.append(time.perf_counter() - begin)
    return {"seconds": min(seconds), "bytes": _peak_memory() - before}


def _peak_memory() -> float:
    status = Path("/proc/self/status").read_text()
    return 1024.0 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def _in_a_process(kind: str, length: int, training: bool) -> dict[str, float]:
    command = [sys.executable, "-m", "mimoflash.benchmarks.attention", kind, str(length), str(int(training))]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    if len(sys.argv) == 4:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), training=sys.argv[3] == "1")))
        return
    for training in (False, True):
        print("forward and backward" if training else "forward")
        for length in LENGTHS:
            full, window = (_in_a_process(kind, length, training) for kind in (GLOBAL, WINDOW))
            print(
                f"  {length:6}  global {full['seconds'] * 1e3:8.1f} ms {full['bytes'] / 1e6:7.0f} MB   "
                f"window {window['seconds'] * 1e3:7.1f} ms {window['bytes'] / 1e6:5.0f} MB   "
                f"ratio {full['seconds'] / window['seconds']:.1f} in time"
            )


if __name__ == "__main__":
    main()
