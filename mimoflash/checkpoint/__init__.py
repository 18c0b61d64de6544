"""Models in and out of files: the published safetensors format, GGUF, the embedded model, a run's training state."""

from mimoflash.checkpoint.delta import LowRank, fingerprint, load_delta, read_delta, save_delta, swap_in
from mimoflash.checkpoint.gguf_in import gguf_bits
from mimoflash.checkpoint.gguf_out import save_gguf
from mimoflash.checkpoint.heads import HEADS, OtherTrunk, load_heads, save_heads
from mimoflash.checkpoint.load import as_dtype, load_model, resolve
from mimoflash.checkpoint.save import save_model
from mimoflash.checkpoint.smol import cached_smol, smol_path
from mimoflash.checkpoint.training_state import latest, load_training_state, save_training_state

__all__ = [
    "HEADS", "LowRank", "OtherTrunk", "as_dtype", "cached_smol", "fingerprint", "gguf_bits", "latest", "load_delta",
    "load_heads", "load_model", "load_training_state", "read_delta", "resolve", "save_delta", "save_gguf", "save_heads",
    "save_model", "save_training_state", "smol_path", "swap_in",
]
