"""The hybrid cache: pages for global layers, a fixed ring a sequence for window and MTP layers.

A sequence has a slot. Position p of a global layer lies at place p % PAGE of page page_table[slot, p // PAGE], the same
page in all global layers; position p of a window layer lies at place p % ring of the slot's ring, whatever the length.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mimoflash.config import WINDOW, AttentionShape, ModelConfig

PAGE = 64  # positions a page of a global layer holds
KINDS = ("global", "window", "mtp")  # of layers
UNLIMITED = 1 << 30  # positions, where all layers have windows


@dataclass
class LayerCache:
    """Keys and values of one layer, each at its own width. Global (`window` None): k (pages, Hkv, PAGE, D), v (pages,
    Hkv, PAGE, Dv). Window: k (slots, Hkv, ring, D), v (slots, Hkv, ring, Dv)."""

    window: int | None
    k: Tensor
    v: Tensor

    @property
    def unit_bytes(self) -> int:
        """Of one page, or of one slot's ring."""
        return self.k[0].nbytes + self.v[0].nbytes


@dataclass
class RingSnapshot:
    """The trunk's window layers of one slot after `length` positions: (k, v) each (Hkv, ring, D or Dv)."""

    length: int
    rings: list[tuple[Tensor, Tensor]]

    @property
    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in self.rings)


class HybridCache:
    """Memory for `slots` sequences and `pages` pages of global layers; `drafts` MTP layers have rings too. Beside it
    there may be a copy of each slot's rings at its prompt's end, and `copies` more, which shared prefixes keep.

    A ring has room for the window and for `drafts` positions that verification may reject. The runner writes keys and
    values; here it is decided where. Positions [mtp_start, mtp_end) of a slot are those whose MTP entries may be read:
    the runner moves both on, a slot that begins anew or is rewound has none.
    """

    def __init__(
        self, config: ModelConfig, *, slots: int, pages: int, copies: int = 0, drafts: int = 0,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    ):
        self.slots, self.pages, self.copies, self.drafts, self.dtype = slots, pages, copies, drafts, dtype
        self.device = torch.device(device)
        self.trunk_layers, self.window = config.layers, config.sliding_window
        kinds = [*config.layer_types, *[WINDOW] * drafts]
        self.layers = [self._layer(config.attention(kind)) for kind in kinds]
        self.has_pages = any(layer.window is None for layer in self.layers)
        self.has_rings = any(layer.window is not None for layer in self.layers[: config.layers])
        most = -(-config.max_position_embeddings // PAGE)
        self.page_table = np.zeros((slots, min(pages, most) if self.has_pages else 0), np.int32)
        self.mtp_start = np.zeros(slots, np.int32)
        self.mtp_end = np.zeros(slots, np.int32)
        self.clear()

    def _layer(self, shape: AttentionShape) -> LayerCache:
        units, places = (self.pages, PAGE) if shape.window is None else (self.slots, shape.window + self.drafts)
        k, v = (
            torch.empty(units, shape.kv_heads, places, width, dtype=self.dtype, device=self.device)
            for width in (shape.head_dim, shape.v_head_dim)
        )
        return LayerCache(shape.window, k, v)

    def clear(self) -> None:
        """All slots and pages are free."""
        self._pages_of: list[list[int]] = [[] for _ in range(self.slots)]
        self._references = [0] * self.pages
        self._free_pages = list(range(self.pages))[::-1]  # the last is taken first: what was used lately is warm
        self._free_slots = list(range(self.slots))[::-1]

    # -- slots ----------------------------------------------------------------------------------------------------

    @property
    def free_slots(self) -> int:
        return len(self._free_slots)

    def take_slot(self) -> int:
        """An empty slot; there must be one."""
        slot = self._free_slots.pop()
        self.mtp_start[slot] = self.mtp_end[slot] = 0
        return slot

    def free_slot(self, slot: int) -> None:
        assert slot not in self._free_slots, "a slot is freed once"
        self.truncate(slot, 0)
        self._free_slots.append(slot)

    # -- pages ----------------------------------------------------------------------------------------------------

    @property
    def free_pages(self) -> int:
        return len(self._free_pages)

    def pages_for(self, length: int) -> int:
        """Pages that `length` positions take."""
        return -(-length // PAGE) if self.has_pages else 0

    def capacity(self, slot: int) -> int:
        """Positions that the slot's pages have room for."""
        return len(self._pages_of[slot]) * PAGE if self.has_pages else UNLIMITED

    def reserve(self, slot: int, length: int) -> bool:
        """Takes pages until positions 0 .. length - 1 fit; False, and nothing is taken, where there are too few."""
        own = self._pages_of[slot]
        missing = self.pages_for(length) - len(own)
        if missing > len(self._free_pages) or self.pages_for(length) > self.page_table.shape[1]:
            return False
        for _ in range(missing):
            page = self._free_pages.pop()
            self._references[page] = 1
            self._add_page(slot, page)
        return True

    def pages_of(self, slot: int) -> list[int]:
        """The slot's pages, in order."""
        return self._pages_of[slot][:]

    def full_pages(self, slot: int, start: int, end: int) -> list[int]:
        """The pages of positions start .. end - 1, which are whole pages."""
        assert start % PAGE == end % PAGE == 0, "a page that is still written to is not shared"
        return self._pages_of[slot][self.pages_for(start) : self.pages_for(end)]

    def references(self, page: int) -> int:
        """By how many slots and shared prefixes the page is used."""
        return self._references[page]

    def adopt(self, slot: int, pages: list[int]) -> None:
        """The empty slot begins with these pages, and takes over a reference to each."""
        assert not self._pages_of[slot], "the slot has pages already"
        for page in pages:
            self._add_page(slot, page)

    def retain(self, pages: list[int]) -> None:
        """One reference more to each of the pages."""
        for page in pages:
            self._references[page] += 1

    def release(self, pages: list[int]) -> None:
        """One reference less to each of the pages."""
        for page in pages:
            self._references[page] -= 1
            if not self._references[page]:
                self._free_pages.append(page)

    def truncate(self, slot: int, length: int) -> None:
        """Gives back the pages that positions 0 .. length - 1 do not need."""
        own, kept = self._pages_of[slot], self.pages_for(length)
        self.release(own[kept:])
        del own[kept:]

    def rewind(self, slot: int, length: int) -> None:
        """The slot goes on at `length`, which is not its end: MTP layers begin anew there."""
        self.truncate(slot, length)
        self.mtp_start[slot] = self.mtp_end[slot] = length

    def _add_page(self, slot: int, page: int) -> None:
        own = self._pages_of[slot]
        self.page_table[slot, len(own)] = page
        own.append(page)

    @property
    def positions(self) -> int:
        """The longest sequence that fits where nothing else is kept."""
        return self.page_table.shape[1] * PAGE if self.has_pages else UNLIMITED

    # -- rings ----------------------------------------------------------------------------------------------------

    def _trunk_rings(self) -> list[LayerCache]:
        return [layer for layer in self.layers[: self.trunk_layers] if layer.window is not None]

    def snapshot(self, slot: int, length: int) -> RingSnapshot:
        """A copy of the slot's rings, which now hold the last of `length` positions."""
        return RingSnapshot(length, [(layer.k[slot].clone(), layer.v[slot].clone()) for layer in self._trunk_rings()])

    def restore(self, slot: int, snapshot: RingSnapshot) -> None:
        """Puts the rings back, and the slot to that length; what it has of global layers before is kept."""
        for layer, (k, v) in zip(self._trunk_rings(), snapshot.rings, strict=True):
            layer.k[slot], layer.v[slot] = k, v
        self.rewind(slot, snapshot.length)

    # -- bytes ----------------------------------------------------------------------------------------------------

    def bytes(self, kind: str | None = None) -> int:
        """Bytes allocated for keys and values: of "global", "window" or "mtp" layers, or of all."""
        return sum(self._unit_bytes(k) * self._units(k, used=False) for k in KINDS if kind in (None, k))

    def used_bytes(self, kind: str | None = None) -> int:
        """Bytes of the pages and rings that belong to a sequence."""
        return sum(self._unit_bytes(k) * self._units(k, used=True) for k in KINDS if kind in (None, k))

    @property
    def copies_bytes(self) -> int:
        """Bytes that all copies of rings may take."""
        return self._unit_bytes("window") * (self.slots + self.copies)

    def _units(self, kind: str, *, used: bool) -> int:
        if kind == "global":
            return self.pages - (self.free_pages if used else 0)
        return self.slots - (self.free_slots if used else 0)

    def _unit_bytes(self, kind: str) -> int:
        trunk, mtp = self.layers[: self.trunk_layers], self.layers[self.trunk_layers :]
        if kind == "mtp":
            return sum(layer.unit_bytes for layer in mtp)
        return sum(layer.unit_bytes for layer in trunk if (layer.window is None) == (kind == "global"))


def page_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Of one page in all global layers together."""
    shapes = [config.attention(kind) for kind in config.layer_types]
    return sum(PAGE * s.kv_heads * (s.head_dim + s.v_head_dim) * dtype.itemsize for s in shapes if s.window is None)


def copy_bytes(config: ModelConfig, drafts: int, dtype: torch.dtype) -> int:
    """Of a copy of one slot's rings: those of the trunk's window layers."""
    shapes = [config.attention(kind) for kind in config.layer_types]
    return _ring_bytes(shapes, drafts, dtype)


def slot_bytes(config: ModelConfig, drafts: int, dtype: torch.dtype) -> int:
    """Of one slot's rings in all window and MTP layers together."""
    shapes = [config.attention(kind) for kind in [*config.layer_types, *[WINDOW] * drafts]]
    return _ring_bytes(shapes, drafts, dtype)


def _ring_bytes(shapes: list[AttentionShape], drafts: int, dtype: torch.dtype) -> int:
    return sum(
        (s.window + drafts) * s.kv_heads * (s.head_dim + s.v_head_dim) * dtype.itemsize
        for s in shapes if s.window is not None
    )
