"""The network: tensors in, tensors out."""

from mimoflash.model.transformer import Transformer, TrunkOutput

__all__ = ["Transformer", "TrunkOutput"]
