"""Weights in 8 and 4 bits, packed for the CPU kernels (the layout: kernels/cpu/linear.h).

32 neighbouring inputs of an output share a scale: w = scale * q with q in -127..127 (int8), or w = scale * q + min with
q in 0..15 (int4). Scale and min are bfloat16, q is rounded to nearest under these rounded values, so that their own
rounding costs next to nothing. A weight takes 8.5 bits (int8) or 5 bits (int4). An int4 group starts from its least and
largest value and is then fitted to its q by least squares, twice: 6 % less error on normally distributed weights.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 32  # inputs that share a scale
PANEL = 16  # outputs stored interleaved
_CHUNK = 1 << 22  # weights worked on at a time: bounds the memory beyond the result


@dataclass
class Quantised:
    """A weight of n outputs and k inputs. G groups of inputs, P panels of outputs, the last ones filled up."""

    kind: str  # "int8" | "int4"
    n: int
    k: int
    data: Tensor  # int8 (P, G, 8, 16, 4), or uint8 (P, G, 4, 16, 4): two inputs' lines in one
    scales: Tensor  # (P, G, 16) bfloat16
    mins: Tensor | None  # (P, G, 16) bfloat16, int4 only

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.data, self.scales, self.mins) if part is not None)


def quantise(weight: Tensor, kind: str, name: str = "weight") -> Quantised:
    """Packs a weight (n, k) on the CPU as "int8" or "int4".

    Raises ValueError, with `name`, for another shape or kind and for values that are not finite.
    """
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"{name}: only matrices can be quantised, not a tensor of shape {tuple(weight.shape)}")
    if kind not in ("int8", "int4"):
        raise ValueError(f"{name}: {kind!r} is no kind of quantised weight; there are int8 and int4")
    n, k = weight.shape
    panels, groups = -(-n // PANEL), -(-k // GROUP)
    lines = 8 if kind == "int8" else 4
    data = torch.empty(panels, groups, lines, PANEL, 4, dtype=torch.int8 if kind == "int8" else torch.uint8)
    scales = torch.empty(panels, groups, PANEL, dtype=torch.bfloat16)
    mins = torch.empty_like(scales) if kind == "int4" else None
    step = max(1, _CHUNK // (PANEL * k))
    for first in range(0, panels, step):
        part = slice(first, first + step)
        rows = weight[first * PANEL : (first + step) * PANEL].detach().float()
        if not rows.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite (NaN or infinite): it cannot be quantised")
        blocks_POGI = _panels(rows)
        if mins is None:
            q_POGI, scale_POG = _int8(blocks_POGI)
            data[part] = _lines(q_POGI).to(torch.int8)
        else:
            q_POGI, scale_POG, min_POG = _int4(blocks_POGI)
            even, odd = _lines(q_POGI).to(torch.uint8).unflatten(2, (4, 2)).unbind(3)
            data[part] = even | odd << 4
            mins[part] = min_POG.transpose(1, 2)
        scales[part] = scale_POG.transpose(1, 2)
    return Quantised(kind, n, k, data, scales, mins)


def dequantise(weight: Quantised) -> Tensor:
    """The weight (n, k) that the packed one stands for, float32."""
    if weight.mins is None:
        lines = weight.data.float()
    else:
        lines = torch.stack([weight.data & 15, weight.data >> 4], 3).flatten(2, 3).float()
    q_PGIO = lines.transpose(-1, -2).flatten(2, 3)  # lines of 4 inputs after each other: 32 inputs
    values = weight.scales.float()[:, :, None] * q_PGIO
    if weight.mins is not None:
        values += weight.mins.float()[:, :, None]
    return values.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)[: weight.n, : weight.k].contiguous()


def _panels(rows: Tensor) -> Tensor:
    """(n, k) to (panels, 16 outputs, groups, 32 inputs), filled up with what widens no group's range."""
    n, k = rows.shape
    full = F.pad(F.pad(rows[None], (0, -k % GROUP), mode="replicate")[0], (0, 0, 0, -n % PANEL))
    return full.unflatten(1, (-1, GROUP)).unflatten(0, (-1, PANEL))


def _lines(q_POGI: Tensor) -> Tensor:
    """(panels, outputs, groups, inputs) to the kernels' (panels, groups, 8, outputs, 4 inputs)."""
    return q_POGI.unflatten(3, (8, 4)).permute(0, 2, 3, 1, 4)


def _int8(blocks: Tensor) -> tuple[Tensor, Tensor]:
    scale = (blocks.abs().amax(-1) / 127).bfloat16()
    return _divide(blocks, scale.float()).round_().clamp_(-127, 127), scale


def _int4(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    least, most = blocks.aminmax(dim=-1)
    best = _round_int4(blocks, most / 15 - least / 15, least)
    centred = blocks - blocks.mean(-1, keepdim=True)
    for _ in range(2):
        q, _, _, error = best
        q_centred = q - q.mean(-1, keepdim=True)
        scale = (q_centred * centred).sum(-1) / q_centred.square().sum(-1).clamp_(min=1e-9)
        fitted = _round_int4(blocks, scale, blocks.mean(-1) - scale * q.mean(-1))
        better = fitted[-1] < error
        best = tuple(torch.where(better[..., None] if new.dim() > better.dim() else better, new, old)
                     for new, old in zip(fitted, best, strict=True))  # fmt: skip
    q, scale, least, _ = best
    return q, scale, least


def _round_int4(blocks: Tensor, scale: Tensor, least: Tensor) -> tuple[Tensor, ...]:
    """q, scale, min, and the squared error of each group."""
    scale, least = scale.bfloat16(), least.bfloat16()
    above = blocks - least.float()[..., None]
    q = _divide(above, scale.float()).round_().clamp_(0, 15)
    return q, scale, least, (q * scale.float()[..., None] - above).square_().sum(-1)


def _divide(blocks: Tensor, scale: Tensor) -> Tensor:
    """blocks / scale; a group without extent stays as it is: 0."""
    return blocks / torch.where(scale > 0, scale, 1.0)[..., None]
