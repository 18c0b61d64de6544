"""MTP layers in a file of their own, for a trunk that stands elsewhere and must be that very one."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mimoflash.checkpoint.files import sync
from mimoflash.checkpoint.layout import published_tensors
from mimoflash.model import Transformer

HEADS = "heads.safetensors"  # beside the training that made them
SMOL_HEADS = Path(__file__).parent.parent / "heads" / "smol-mtp.safetensors"
_MTP, _DRAFT_TOKENS, _TRUNK = "model.mtp.", "draft_tokens", "trunk_sha256"


class OtherTrunk(ValueError):
    """MTP layers do not belong to this trunk."""


def save_heads(model: Transformer, file: Path, trunk: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes the model's MTP layers by their published names, its draft vocabulary, and the checksum of the file
    `trunk` that they belong to."""
    tensors = {name: t.to("cpu", dtype) for name, t in published_tensors(model).items() if name.startswith(_MTP)}
    if model.model.mtp.draft_tokens is not None:
        tensors[_DRAFT_TOKENS] = model.model.mtp.draft_tokens.to("cpu", torch.int32)
    temporary = file.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"format": "pt", _TRUNK: file_sha256(trunk)})
    sync(temporary)
    temporary.replace(file)


def load_heads(model: Transformer, file: Path, trunk: Path) -> None:
    """Gives `model`, read from the file `trunk`, the MTP layers in `file`.

    Raises OtherTrunk, a ValueError, naming both files where they belong to another trunk, and ValueError naming the
    file where it is damaged, or not of this model's shape.
    """
    try:
        with safe_open(file, "pt") as heads:
            if (heads.metadata() or {}).get(_TRUNK) != file_sha256(trunk):
                raise OtherTrunk(f"{file}: these MTP layers were trained for another model than {trunk} (sha256)")
            tensors = {name: heads.get_tensor(name) for name in heads.keys()}  # noqa: SIM118  not a dictionary
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error}): make it again (of the package: install it "
                         "again)") from None
    draft_tokens = tensors.pop(_DRAFT_TOKENS, None)
    model.set_mtp_layers(1 + max(int(name.split(".")[3]) for name in tensors))
    wanted = {name: view for name, view in published_tensors(model).items() if name.startswith(_MTP)}
    if {name: t.shape for name, t in tensors.items()} != {name: view.shape for name, view in wanted.items()}:
        raise ValueError(f"{file}: its tensors are not those of MTP layers for this model")
    for name, view in wanted.items():
        view.copy_(tensors[name])
    if draft_tokens is not None:
        model.model.mtp.draft_tokens = draft_tokens.to(model.lm_head.weight.device, torch.long)


def file_sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
