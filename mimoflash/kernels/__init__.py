"""What plain PyTorch is slow at, each with a reference in PyTorch beside it."""
