"""The hybrid cache: global layers keep every position, window layers (and MTP layers) a ring of the window."""

import torch
from torch import Tensor

from mimoflash.config import WINDOW, AttentionShape, ModelConfig


class HybridCache:
    """Keys and values of `rows` sequences, each at its own length, that only grow: a ring has no room to take back what
    it has overwritten. Key and value keep their own widths."""

    def __init__(
        self, config: ModelConfig, rows: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ):
        kinds = [*config.layer_types, *[WINDOW] * config.num_nextn_predict_layers]
        self.length = torch.zeros(rows, dtype=torch.long, device=device)
        self.layers = [_LayerCache(config.attention(kind), rows, dtype, device) for kind in kinds]

    def update(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `mimoflash.model.attention.Cache`. A position of -1 is padding and is not kept."""
        return self.layers[layer].update(k, v, positions)

    def advance(self, lengths: Tensor) -> None:
        """Sequences have grown to `lengths` (rows,); the next forward without positions goes on from there."""
        self.length = lengths.to(self.length)

    def keep_rows(self, rows: Tensor) -> None:
        """Drops all sequences but `rows`, in that order."""
        self.length = self.length[rows]
        for layer in self.layers:
            layer.k, layer.v, layer.positions = layer.k[rows], layer.v[rows], layer.positions[rows]

    def bytes(self, kind: str | None = None) -> int:
        """Bytes allocated for keys and values: of "global" layers, of "window" layers, or of all."""
        chosen = [x for x in self.layers if kind is None or (x.window is None) == (kind == "global")]
        return sum(x.k.nbytes + x.v.nbytes for x in chosen)


class _LayerCache:
    """Place p holds position p (global layers, grown by doubling) or p modulo the window (a ring)."""

    def __init__(self, shape: AttentionShape, rows: int, dtype: torch.dtype, device: torch.device | str):
        self.window = shape.window
        places = shape.window or 0
        self.k = torch.zeros(rows, places, shape.kv_heads, shape.head_dim, dtype=dtype, device=device)
        self.v = torch.zeros(rows, places, shape.kv_heads, shape.v_head_dim, dtype=dtype, device=device)
        self.positions = torch.full((rows, places), -1, dtype=torch.long, device=device)

    def update(self, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.window is None:
            self._grow(int(positions.max()) + 1)
            self._write(k, v, positions)
            return self.k, self.v, self.positions
        if positions.shape[1] == 1:
            self._write(k, v, positions)  # what it overwrites has just left the window
            return self.k, self.v, self.positions
        # new queries still need what they are about to overwrite
        seen = torch.cat([self.k, k], 1), torch.cat([self.v, v], 1), torch.cat([self.positions, positions], 1)
        latest = positions > positions.max(1, keepdim=True).values - self.window
        self._write(k, v, positions.where(latest, -1))
        return seen

    def _grow(self, places: int) -> None:
        missing = places - self.k.shape[1]
        if missing > 0:
            missing = max(missing, self.k.shape[1], 64)
            rows = self.k.shape[0]
            self.k = torch.cat([self.k, self.k.new_zeros(rows, missing, *self.k.shape[2:])], 1)
            self.v = torch.cat([self.v, self.v.new_zeros(rows, missing, *self.v.shape[2:])], 1)
            self.positions = torch.cat([self.positions, self.positions.new_full((rows, missing), -1)], 1)

    def _write(self, k: Tensor, v: Tensor, positions: Tensor) -> None:
        row, column = (positions >= 0).nonzero(as_tuple=True)
        kept = positions[row, column]
        place = kept if self.window is None else kept % self.window
        self.k[row, place], self.v[row, place] = k[row, column].to(self.k.dtype), v[row, column].to(self.v.dtype)
        self.positions[row, place] = kept
