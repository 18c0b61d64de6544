"""Where Triton's kernels run in these tests: on the card, or on the CPU by its interpreter."""

import torch

from mimoflash.kernels import paged_attention

DEVICE = "cuda" if torch.cuda.is_available() and not paged_attention.is_interpreted() else "cpu"
