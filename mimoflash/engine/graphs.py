"""CUDA graphs: a pass of fixed sizes is recorded once and replayed, so that a step costs one launch, not a thousand."""

import warnings
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Outputs = tuple[Tensor, ...]


class Inputs:
    """Integers of a pass in memory that stays where it is: written through `host()`, read through `device`.

    `shapes`: int64 arrays by name, one after the other in one piece of memory, which goes over in one copy.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], device: torch.device):
        sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
        self.staged = torch.zeros(sum(sizes.values()), dtype=torch.int64, pin_memory=device.type == "cuda")
        self.memory = self.staged.to(device, copy=True)
        self.sent = torch.cuda.Event() if device.type == "cuda" else None
        self.arrays: dict[str, NDArray[np.int64]] = {}
        self.device: dict[str, Tensor] = {}
        start = 0
        for name, shape in shapes.items():
            piece = slice(start, start + sizes[name])
            self.arrays[name] = self.staged[piece].numpy().reshape(shape)
            self.device[name] = self.memory[piece].view(shape)
            start += sizes[name]

    def host(self) -> dict[str, NDArray[np.int64]]:
        """The arrays, to be written; what was sent before has arrived."""
        if self.sent is not None:
            self.sent.synchronize()
        return self.arrays

    def send(self, unused: int = 0) -> None:
        """All but the last `unused` numbers go to the device, which is not waited for."""
        end = len(self.staged) - unused
        self.memory[:end].copy_(self.staged[:end], non_blocking=True)
        if self.sent is not None:
            self.sent.record()


class Graphs:
    """Runs functions of no arguments that read and write fixed memory, recorded where the device is a GPU.

    Where recording fails, a warning says why, and from then on functions run operation by operation.
    """

    def __init__(self, device: torch.device, *, enabled: bool):
        self.enabled = enabled and device.type == "cuda"
        self.device = device
        self.pool: Any = torch.cuda.graph_pool_handle() if self.enabled else None
        self.stream: Any = torch.cuda.Stream(device) if self.enabled else None
        self.recorded: dict[Hashable, tuple[torch.cuda.CUDAGraph, Outputs]] = {}

    def run(self, key: Hashable, body: Callable[[], Outputs]) -> Outputs:
        """What `body` returns; from a graph it is valid until the next run."""
        if not self.enabled:
            return body()
        with torch.cuda.device(self.device):
            if key not in self.recorded:
                self._warm_up(body)
                try:
                    self.recorded[key] = self._record(body)
                except RuntimeError as error:
                    warnings.warn(f"decoding runs without CUDA graphs, which is slower: {error}", stacklevel=2)
                    self.enabled = False
                    self.recorded.clear()
                    return body()
            graph, outputs = self.recorded[key]
            graph.replay()
        return outputs

    def _warm_up(self, body: Callable[[], Outputs]) -> None:
        """Kernels are compiled and libraries allocate what they need, which cannot be recorded; not on the default
        stream, as PyTorch asks for."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            body()
        torch.cuda.current_stream().wait_stream(self.stream)

    def _record(self, body: Callable[[], Outputs]) -> tuple[torch.cuda.CUDAGraph, Outputs]:
        graph = torch.cuda.CUDAGraph()
        # other threads (a server's) may use the device meanwhile
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            outputs = body()
        return graph, outputs
