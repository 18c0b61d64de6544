"""The compiled kernels (kernels/cpu) from Python: the library for this machine's instruction set, by ctypes.

Without a compiled library `available()` is false, one warning says how to get it, and the package runs on PyTorch.
"""

import ctypes
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mimoflash.kernels.compile import INSTRUCTION_SETS, fingerprint, library_path
from mimoflash.kernels.quantize import GROUP, Quantised, dequantise, quantise

HOW_TO = "python -m mimoflash.kernels.compile compiles it (it needs g++)"
KINDS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}  # enum Kind of cpu/linear.h
Pointer = ctypes.c_void_p


class Matrix(ctypes.Structure):
    """`Matrix` of cpu/linear.h. Whoever makes one keeps the tensors that it points into."""

    _fields_ = (
        ("kind", ctypes.c_int32), ("n", ctypes.c_int32), ("k", ctypes.c_int32),
        ("data", Pointer), ("scales", Pointer), ("mins", Pointer),
    )  # fmt: skip


class Activations(ctypes.Structure):
    """`Activations` of cpu/linear.h."""

    _fields_ = (
        ("x", Pointer), ("stride", ctypes.c_int64), ("rows", ctypes.c_int), ("k", ctypes.c_int),
        ("q", Pointer), ("scale", Pointer), ("sum", Pointer),
    )  # fmt: skip


class LinearJob(ctypes.Structure):
    """`LinearJob` of cpu/linear.h."""

    _fields_ = (
        ("w", ctypes.POINTER(Matrix)), ("x", ctypes.POINTER(Activations)), ("in_rows", Pointer), ("out_rows", Pointer),
        ("rows", ctypes.c_int), ("y", Pointer), ("y_stride", ctypes.c_int64), ("add", ctypes.c_bool),
    )  # fmt: skip


@cache
def library() -> ctypes.CDLL | None:
    """The fastest compiled library that this machine runs and that computes rightly; None where there is none."""
    for name in reversed(instruction_sets()):
        if _computes_rightly(load(name)):
            return load(name)
        warnings.warn(f"the compiled kernels for {name} compute wrongly on this machine and are left out", stacklevel=2)
    warnings.warn(f"no compiled CPU kernels, or outdated ones: all runs on PyTorch, slower; {HOW_TO}", stacklevel=2)
    return None


def available() -> bool:
    """Whether there are compiled kernels; where not, the first call warns."""
    return library() is not None


def instruction_sets() -> list[str]:
    """Names, in ascending order, of the instruction sets that this machine has and a current library is for."""
    if not _is_current("base"):
        return []
    runs_here = list(INSTRUCTION_SETS)[: load("base").mf_instruction_sets()]
    return [name for name in runs_here if _is_current(name)]


def _is_current(name: str) -> bool:
    """Whether the library is there and shares the structures of the headers beside it: else calls go astray."""
    if not library_path(name).exists():
        return False
    try:
        interface = ctypes.CDLL(str(library_path(name))).mf_interface
    except (OSError, AttributeError):  # another machine's, or older than this check
        return False
    interface.restype = ctypes.c_char_p
    return interface().decode() == fingerprint()


@cache
def load(name: str) -> ctypes.CDLL:
    """The library for one instruction set, which the machine must have, working in PyTorch's thread pool."""
    kernels = ctypes.CDLL(str(library_path(name)))
    kernels.mf_quantise.argtypes = [ctypes.POINTER(Activations), ctypes.c_int]
    kernels.mf_linear.argtypes = [ctypes.POINTER(LinearJob), ctypes.c_int, ctypes.c_int]
    kernels.mf_workspace.restype, kernels.mf_release.argtypes = Pointer, [Pointer]
    kernels.mf_forward.argtypes = kernels.mf_draft.argtypes = [Pointer, Pointer, Pointer, ctypes.c_int]
    sizes = [ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    kernels.mf_sample.argtypes = [Pointer, Pointer, *sizes, *[Pointer] * 9, ctypes.c_int]
    kernels.mf_read.argtypes = [Pointer, ctypes.c_int64, ctypes.c_int]
    kernels.mf_thread_pool.argtypes = [Pointer, Pointer]
    kernels.mf_thread_pool(*_thread_pool())
    return kernels


def _thread_pool() -> tuple[int | None, int | None]:
    """Addresses of GOMP_parallel and omp_get_num_threads in the OpenMP library that PyTorch has loaded, if it is such.

    One pool serves both: a second one's threads would spin against PyTorch's.
    """
    try:
        rows = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    except OSError:
        return None, None
    mapped = {row[5] for row in rows if len(row) == 6}
    found = sorted({path for path in mapped if "omp" in Path(path).name and ".so" in path}, key=_not_torchs)
    for path in found:
        try:
            openmp = ctypes.CDLL(path)
        except OSError:  # replaced on disk since
            continue
        if hasattr(openmp, "GOMP_parallel") and hasattr(openmp, "omp_get_num_threads"):
            parallel, team_size = openmp.GOMP_parallel, openmp.omp_get_num_threads
            return ctypes.cast(parallel, Pointer).value, ctypes.cast(team_size, Pointer).value
    return None, None


def _not_torchs(path: str) -> bool:
    return "/torch" not in path


def matrix(weight: Tensor | Quantised) -> Matrix:
    """A view of a weight (n, k): float32 or bfloat16, contiguous, on the CPU; or quantised."""
    if isinstance(weight, Quantised):
        mins = None if weight.mins is None else weight.mins.data_ptr()
        pointers = weight.data.data_ptr(), weight.scales.data_ptr(), mins
        return Matrix(KINDS[weight.kind], weight.n, weight.k, *pointers)
    assert weight.is_contiguous(), "kernels read a weight where it lies"
    return Matrix(KINDS[str(weight.dtype).removeprefix("torch.")], *weight.shape, weight.data_ptr(), None, None)


def linear(
    x: Tensor, weights: Sequence[Tensor | Quantised], *, threads: int | None = None, kernels: ctypes.CDLL | None = None,
) -> list[Tensor]:  # fmt: skip
    """x (rows, k) float32 times each of the weights (n, k) transposed, all in one call: tensors (rows, n) float32."""
    kernels = kernels or library()
    assert kernels is not None
    assert x.dtype == torch.float32
    assert x.stride(1) == 1 or x.shape[1] == 1
    threads = threads or torch.get_num_threads()
    (rows, k), groups = x.shape, -(-x.shape[1] // GROUP)
    q = torch.empty(rows, groups * GROUP, dtype=torch.int8)
    scale, total = torch.empty(rows, groups), torch.empty(rows, groups, dtype=torch.int32)
    view = Activations(x.data_ptr(), x.stride(0), rows, k, q.data_ptr(), scale.data_ptr(), total.data_ptr())
    if any(isinstance(weight, Quantised) for weight in weights):
        kernels.mf_quantise(view, threads)
    matrices = [matrix(weight) for weight in weights]
    results = [torch.empty(rows, m.n) for m in matrices]
    jobs = (LinearJob * len(matrices))()
    for job, m, y in zip(jobs, matrices, results, strict=True):
        assert m.k == k
        job.w, job.x = ctypes.pointer(m), ctypes.pointer(view)
        job.rows, job.y, job.y_stride = rows, y.data_ptr(), m.n
    kernels.mf_linear(jobs, len(jobs), threads)
    return results


def sample(
    logits: Tensor, raw: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, min_p: Tensor, seed: Tensor,
    position: Tensor, *, threads: int | None = None, kernels: ctypes.CDLL | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What mimoflash.engine.sampling.sample gives, which says the arguments; logits and raw float32."""
    kernels = kernels or library()
    assert kernels is not None
    rows, vocab = logits.shape
    logits, raw = (x if x.is_contiguous() else x.contiguous() for x in (logits, raw))
    assert logits.dtype == raw.dtype == torch.float32
    types = (torch.float32, torch.float32, torch.int32, torch.float32, torch.int64, torch.int64)
    given = (temperature, top_p, top_k, min_p, seed, position)
    columns = [x.to("cpu", dtype).contiguous() for x, dtype in zip(given, types, strict=True)]
    assert all(x.shape == (rows,) for x in columns)
    tokens, logprobs, sampling = torch.empty(rows, dtype=torch.int32), torch.empty(rows), torch.empty(rows)
    pointers = [x.data_ptr() for x in (*columns, tokens, logprobs, sampling)]
    threads = threads or torch.get_num_threads()
    if kernels.mf_sample(logits.data_ptr(), raw.data_ptr(), vocab, rows, vocab, *pointers, threads):
        raise MemoryError("no memory for sampling")
    return tokens.long(), logprobs, sampling


def _computes_rightly(kernels: ctypes.CDLL) -> bool:
    """A quick check on loading: whole and cut groups, one row and several, against PyTorch."""
    random = torch.Generator().manual_seed(0)
    w, x = (torch.randn(rows, 71, generator=random) for rows in (37, 6))
    weights: list[Tensor | Quantised] = [w, w.bfloat16(), quantise(w, "int8"), quantise(w, "int4")]
    for weight, y in zip(weights, linear(x, weights, threads=1, kernels=kernels), strict=True):
        exact = dequantise(weight) if isinstance(weight, Quantised) else weight.float()
        tolerance = 0.2 if isinstance(weight, Quantised) else 1e-4  # x is quantised too
        if not torch.allclose(y, x @ exact.T, atol=tolerance, rtol=0):
            return False
    return True
