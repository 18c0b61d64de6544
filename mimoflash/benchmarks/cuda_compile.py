"""Compiles every Triton kernel that decoding launches, for cards that need not be there.

`python -m mimoflash.benchmarks.cuda_compile [config.json ...]` prints a line a kernel and card: shared memory, and
registers and bytes of stack (what is spilled) a thread. The runner's own passes run over tensors without memory; each
launch compiles instead.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimoflash.config import ModelConfig
from mimoflash.engine.cache import HybridCache
from mimoflash.engine.cuda import CudaRunner
from mimoflash.engine.fp8 import MATRICES
from mimoflash.engine.runner import RECENT
from mimoflash.kernels.grouped import SCALE_BLOCK, decode_experts, fp8_linear
from mimoflash.model import Transformer
from mimoflash.model.moe import Experts

CARDS = {"A100": 80, "L40S": 89, "H100": 90}
SHARED_BYTES = 99 * 1024  # of a block, on the card among these that has the least
_TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8",
    torch.bool: "i1",
}


def compile_decoding(
    config: ModelConfig, dtype: torch.dtype, capabilities: Sequence[int], report: Callable[[dict[str, Any]], None], *,
    batch: int = 4, drafts: int = 3, fp8: bool = True,
) -> None:
    """Each kernel that a runner of the model launches, on each compute capability (90: sm_90); `report` is given what
    it takes. Raises what Triton raises where one does not compile."""
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
        model.set_mtp_layers(drafts)
        cache = HybridCache(model.config, slots=batch, pages=64, drafts=drafts, dtype=dtype, device="meta")
    runner = CudaRunner(model, cache)
    known: set[str] = set()

    def launch(kernel: Any, arguments: dict[str, Any], options: dict[str, int]) -> None:
        for capability in capabilities:
            signature, constants = _signature(kernel, arguments)
            key = f"{kernel.__name__} {capability} {signature} {constants} {options}"
            if key not in known:
                known.add(key)
                sizes = {name: constants[name] for name in _SHOWN if name in constants}
                compiled = _compile(kernel, signature, constants, options, capability)
                report({"kernel": kernel.__name__, "sm": capability, "dtype": _TYPES[dtype], **sizes, **compiled})

    with torch.inference_mode(), _instead_of_launches(launch):
        for length in (1, 1 + drafts):
            runner._decode_pass(runner._inputs(batch, length).device)
        if drafts:
            numbers = torch.zeros(batch, RECENT, dtype=torch.long, device="meta")
            inputs = {"recent": numbers} | {name: numbers[:, 0].contiguous() for name in _DRAFT_INPUTS}
            runner._draft_pass(inputs, drafts, True)
        if fp8:
            _run_fp8(model, dtype, batch)


_SHOWN = ("L", "WINDOW", "D", "N", "K", "BM", "BN", "FP8")
_DRAFT_INPUTS = ("slots", "positions", "firsts", "ends", "counts", "seeds", "temperatures")


def _run_fp8(model: Transformer, dtype: torch.dtype, batch: int) -> None:
    """The model's matrices in FP8, with a few rows and with a prompt's."""

    def scales(w: Tensor) -> Tensor:
        sides = (-(-side // SCALE_BLOCK) for side in w.shape[-2:])
        return torch.empty(*w.shape[:-2], *sides, device="meta")

    for rows in (batch, 512):
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in MATRICES:
                x = torch.empty(rows, module.in_features, dtype=dtype, device="meta")
                fp8_linear(x, module.weight.to(torch.float8_e4m3fn), scales(module.weight))
            elif isinstance(module, Experts):
                gate_up, down = (w.to(torch.float8_e4m3fn) for w in (module.gate_up_proj, module.down_proj))
                x = torch.empty(rows, gate_up.shape[2], dtype=dtype, device="meta")
                indices = torch.empty(rows, model.config.num_experts_per_tok, dtype=torch.long, device="meta")
                decode_experts(x, gate_up, down, indices, indices.float(), (scales(gate_up), scales(down)))


@contextmanager
def _instead_of_launches(launch: Callable[[Any, dict[str, Any], dict[str, int]], None]) -> Iterator[None]:
    from triton.runtime.jit import JITFunction

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        arguments = dict(zip(kernel.arg_names, args, strict=False))
        arguments |= {name: value for name, value in named.items() if name in kernel.arg_names}
        launch(kernel, arguments, {name: value for name, value in named.items() if name not in kernel.arg_names})

    original, JITFunction.run = JITFunction.run, run
    try:
        yield
    finally:
        JITFunction.run = original


def _signature(kernel: Any, arguments: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """Types by argument, and constants: those marked so, and whole numbers that are 1, as a launch has it."""
    signature, constants = {}, {}
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = f"*{_TYPES[value.dtype]}"
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    return signature, constants


def _compile(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], options: dict[str, int], capability: int
) -> dict[str, int]:
    import triton
    from triton.backends.compiler import GPUTarget

    # memory comes from PyTorch's allocator, which aligns it
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {"shared_bytes": compiled.metadata.shared, **_resources(compiled.asm["cubin"])}


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers and stack bytes a thread, as the tool that comes with Triton reads them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    fields = dict(field.split(":") for line in text.splitlines() if "REG:" in line for field in line.split())
    return {"registers": int(fields["REG"]), "stack_bytes": int(fields["STACK"])}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compiles the kernels of decoding, without a card.")
    parser.add_argument("configs", nargs="*", help="config.json files; the published model's if none is given")
    parser.add_argument("--sm", type=int, action="append", help="compute capability, 80 to 90; may be repeated")
    parser.add_argument("--dtype", choices=["bf16", "float32"], default="bf16")
    chosen = parser.parse_args()
    shapes = {Path(file).stem: ModelConfig.load(file) for file in chosen.configs} or {"flash": ModelConfig.flash()}
    taken = []

    def report(result: dict[str, Any]) -> None:
        print(" ".join(f"{key} {value}" for key, value in result.items()), flush=True)
        taken.append(result["shared_bytes"])

    for name, config in shapes.items():
        print(name, flush=True)
        dtype = torch.bfloat16 if chosen.dtype == "bf16" else torch.float32
        compile_decoding(config, dtype, chosen.sm or list(CARDS.values()), report)
    print(f"{len(taken)} kernels, at most {max(taken)} bytes of shared memory of {SHARED_BYTES}")
    sys.exit(max(taken) > SHARED_BYTES)


if __name__ == "__main__":
    main()
