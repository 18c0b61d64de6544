"""Triton kernels. Importing a module of this folder needs Triton; `mimoflash.kernels.paged_attention` and
`mimoflash.kernels.grouped` do so where they run them, and have the same in PyTorch beside them."""
