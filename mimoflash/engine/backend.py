"""What an engine runs on: which runner, with weights of which type, and how much memory for keys and values."""

import os

import torch

from mimoflash.config import ModelConfig
from mimoflash.engine.cache import PAGE, HybridCache, copy_bytes, page_bytes, slot_bytes
from mimoflash.engine.runner import Runner, TorchRunner
from mimoflash.model import Transformer

_FLOATS = {"float32": torch.float32, "bf16": torch.bfloat16}
_DTYPES = (*_FLOATS, "int8", "int4", "fp8")


def make_runner(
    model: Transformer, *, speculate: int, dtype: str | None, max_running: int, cache_bytes: int | None,
    share_prefixes: bool,
) -> Runner:
    """The compiled kernels' on a CPU that has them, the one with graphs on a GPU, else PyTorch's; arguments as
    Engine's."""
    layers = len(model.model.mtp.layers)
    if not 0 <= speculate <= 3:
        raise ValueError(f"speculate is {speculate}: MTP layers draft 0 to 3 tokens")
    if speculate > layers:
        raise ValueError(f"speculate is {speculate}, but the model has {layers} MTP layers, and each drafts one token")
    if max_running < 1:
        raise ValueError(f"max_running is {max_running}: one request at least has to run")
    if dtype not in (None, *_DTYPES):
        raise ValueError(f"dtype is {dtype!r}: it must be one of {', '.join(_DTYPES)}, or None")
    weight = model.lm_head.weight
    stored = {value: name for name, value in _FLOATS.items()}.get(weight.dtype)
    is_native = weight.device.type == "cpu" and stored is not None and _native_is_available()
    if dtype in ("int8", "int4") and not is_native:
        raise ValueError(
            f"dtype {dtype!r} needs the compiled CPU kernels, and the model on the CPU in float32 or bf16: "
            "choose float32 or bf16"
        )
    if dtype == "fp8" and weight.device.type != "cuda":
        raise ValueError("dtype 'fp8' is for a model on a GPU: choose another, or move the model there")
    # keys and values: as the weights, but not below bf16
    kept = _FLOATS.get(dtype, torch.bfloat16) if dtype else weight.dtype
    cache = _allocate(model.config, max_running, cache_bytes, share_prefixes, speculate, kept, weight.device)
    if is_native:
        from mimoflash.engine.native import NativeRunner

        return NativeRunner(model, cache, weights=dtype or str(stored))
    if weight.device.type == "cuda":
        from mimoflash.engine.cuda import CudaRunner

        return CudaRunner(model, cache, dtype=_FLOATS.get(dtype or ""), fp8=dtype == "fp8")
    return TorchRunner(model, cache, dtype=_FLOATS.get(dtype or ""))


def _native_is_available() -> bool:
    try:
        from mimoflash.engine import native  # noqa: F401
        from mimoflash.kernels.native import available
    except ImportError:
        return False
    return available()


def _allocate(
    config: ModelConfig, max_running: int, cache_bytes: int | None, share_prefixes: bool, drafts: int,
    dtype: torch.dtype, device: torch.device,
) -> HybridCache:
    """At most half of the memory goes into rings, and a copy of each for the end of a prompt; where prefixes are
    shared, at most a quarter before into the copies that these keep; the rest into pages, no more than all slots at
    full length need."""
    page, copy = page_bytes(config, dtype), copy_bytes(config, drafts, dtype)
    slot = slot_bytes(config, drafts, dtype) + copy
    most = -(-config.max_position_embeddings // PAGE)
    budget = _free_memory(device) // 4 if cache_bytes is None else cache_bytes
    if budget < slot + page:
        raise ValueError(
            f"cache_bytes is {budget}, but one sequence's window layers take {slot} and {PAGE} positions of its global "
            f"layers {page}: give more"
        )
    copies = 0
    if share_prefixes and copy:
        copies = min(budget // 4 // copy, (budget - slot - page) // copy, max_running * most)
        budget -= copies * copy
    slots = min(max_running, max(1, budget // (2 * slot if page else slot))) if slot else max_running
    slots = min(slots, (budget - page) // slot) if slot else slots  # one page at least
    pages = min((budget - slots * slot) // page, slots * most) if page else 0
    return HybridCache(
        config, slots=slots, pages=pages, copies=copies, drafts=drafts, dtype=dtype, device=device
    )


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":") for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
