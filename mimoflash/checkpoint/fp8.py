"""FP8 weights in blocks of 128 x 128, as the published checkpoint stores them: weight = fp8 * `weight_scale_inv`.

The fused qkv of the family's later models is here too, since its scales are tiled by chunk and not by row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
E4M3 = torch.float8_e4m3fn
_LARGEST = torch.finfo(E4M3).max  # 448


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (R, C) -> e4m3 (R, C) and float32 scales (ceil(R / 128), ceil(C / 128)).

    A block's scale is its largest magnitude / 448; a block of zeros has scale 1. The sides need not be multiples of
    128: the last blocks are narrower. Raises ValueError if the weight is not finite.
    """
    rows, columns = weight.shape
    padded = F.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # (R / 128, 128, C / 128, 128)
    largest = blocks.abs().amax((1, 3))
    if not largest.isfinite().all():
        raise ValueError("a weight that is not finite cannot be stored as FP8")
    scale = torch.where(largest > 0, largest / _LARGEST, 1.0).clamp_min(torch.finfo(torch.float32).tiny)
    quantised = (blocks / scale[:, None, :, None]).clamp(-_LARGEST, _LARGEST).to(E4M3)
    return quantised.flatten(2).flatten(0, 1)[:rows, :columns].contiguous(), scale


def dequantise(weight: Tensor, scale: Tensor) -> Tensor:
    """e4m3 (R, C) and scales (ceil(R / 128), ceil(C / 128)) -> float32 (R, C).

    Raises ValueError if the scales have another shape or are not finite.
    """
    wanted = tuple(-(-side // BLOCK) for side in weight.shape)
    if tuple(scale.shape) != wanted:
        raise ValueError(f"weight_scale_inv is {tuple(scale.shape)}; blocks of {BLOCK} x {BLOCK} need {wanted}")
    if not scale.isfinite().all():
        raise ValueError("weight_scale_inv holds a number that is not finite")
    rows, columns = weight.shape
    wide = scale.float().repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return weight.float() * wide


def split_fused_qkv(fused: Tensor, scale: Tensor | None, chunks: int, sizes: tuple[int, int, int]) -> list[Tensor]:
    """`qkv_proj` (R, C) -> q, k, v, of `sizes` rows each (the layout of the published MiMo-V2.5).

    The rows are `chunks` pieces [Q_c | K_c | V_c] one after the other (one for each global KV head, in window and MTP
    layers too); the rows of `scale` are tiled for each piece afresh, so that a piece's last block may be narrower.
    Raises ValueError if rows do not divide or scales do not fit.
    """
    if fused.shape[0] != sum(sizes) or any(size % chunks for size in sizes):
        raise ValueError(f"qkv_proj has {fused.shape[0]} rows; {chunks} chunks of q, k, v = {sizes} do not fit")
    pieces = list(fused.chunk(chunks))
    if scale is not None:
        if scale.shape[0] % chunks:
            raise ValueError(f"weight_scale_inv has {scale.shape[0]} rows, which {chunks} chunks do not divide")
        pieces = [dequantise(piece, part) for piece, part in zip(pieces, scale.chunk(chunks), strict=True)]
    parts = [piece.split([size // chunks for size in sizes]) for piece in pieces]
    return [torch.cat(rows) for rows in zip(*parts, strict=True)]
