"""Reading GGUF files: `llama` (dense) and `mimo2`, quantised or not, into a Transformer."""

import math
import struct
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mimoflash.checkpoint.gguf_layout import gguf_tensors
from mimoflash.checkpoint.layout import empty_model, materialise
from mimoflash.config import DENSE, GLOBAL, SPARSE, WINDOW, ModelConfig
from mimoflash.model import Transformer

_STORED = {"F16": torch.float16, "BF16": torch.bfloat16}
_ROWS = 4096  # dequantised at a time


def read_gguf(file: Path, dtype: torch.dtype | None, device: torch.device | str) -> Transformer:
    """The model in a GGUF file. `dtype` None: as the embedding is stored; quantised types become float32.

    Raises ValueError naming file and tensor where something is missing, too much or of another shape, and where the
    architecture is another one.
    """
    try:
        reader = _Reader(file)
    except (ValueError, KeyError, IndexError, OverflowError, struct.error) as error:
        raise ValueError(f"{file}: cut off or not a GGUF file ({error}): fetch it again") from None
    stored = {_own_name(tensor.name): tensor for tensor in reader.tensors}
    try:
        config = _config(reader, stored)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None
    model = empty_model(config)

    def is_fused(block: int) -> bool:
        return f"blk.{block}.attn_qkv.weight" in stored

    _check(file, gguf_tensors(model, is_fused), stored)
    materialise(model, dtype or _STORED.get(stored["token_embd.weight"].tensor_type.name, torch.float32), device)
    permuted = _permuted(config) if reader.architecture == "llama" else {}
    for name, views in gguf_tensors(model, is_fused).items():
        tensor = _values(stored[name].data, stored[name].tensor_type)
        if name.split(".")[-2] in permuted:
            tensor = _unpermute(tensor, permuted[name.split(".")[-2]])
        for view, rows in zip(views, tensor.split([view.shape[0] for view in views]), strict=True):
            view.copy_(rows)
    return model


def gguf_bits(file: Path) -> float:
    """Bits a weight that the file's tensors take, with their scales."""
    tensors = _Reader(file).tensors
    return float(8 * sum(tensor.n_bytes for tensor in tensors) / sum(tensor.n_elements for tensor in tensors))


def _own_name(name: str) -> str:
    """llama.cpp takes the norm before the head of an MTP layer under two names."""
    return name.replace("layer_output_norm", "nextn.shared_head_norm")


def _check(file: Path, wanted: dict[str, tuple[Tensor, ...]], stored: dict[str, Any]) -> None:
    for name, views in wanted.items():
        if name not in stored:
            raise ValueError(f"{file}: {name} is missing")
        shape = (sum(view.shape[0] for view in views), *views[0].shape[1:])
        found = tuple(int(side) for side in reversed(stored[name].shape))
        if found != shape:
            raise ValueError(f"{file}: {name} is {found}, but the metadata make it {shape}")
    for name in stored:
        if name not in wanted:
            raise ValueError(f"{file}: {name} has no place in this family of models")


# -- numbers ----------------------------------------------------------------------------------------------------------


def _values(data: NDArray[Any], kind: gguf.GGMLQuantizationType) -> Tensor:
    """A tensor's data as torch's, quantised types as float32, some rows at a time."""
    if kind.name == "F32":
        return torch.from_numpy(np.array(data, dtype=np.float32))
    if kind.name == "F16":
        return torch.from_numpy(np.array(data))
    if kind.name == "BF16":
        return torch.from_numpy(np.array(data)).view(torch.bfloat16)
    traits = getattr(gguf.quants, kind.name, None)
    if traits is None:
        raise ValueError(f"quantisation {kind.name} is not known")
    block, width = gguf.GGML_QUANT_SIZES[kind]
    out = np.empty((*data.shape[:-1], data.shape[-1] // width * block), np.float32)
    rows, rows_out = data.reshape(-1, data.shape[-1]), out.reshape(-1, out.shape[-1])
    for start in range(0, len(rows), _ROWS):
        blocks = rows[start : start + _ROWS].reshape(-1, width)
        rows_out[start : start + _ROWS] = traits.dequantize_blocks(blocks).reshape(-1, out.shape[-1])
    return torch.from_numpy(out)


def _permuted(config: ModelConfig) -> dict[str, int]:
    return {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}


def _unpermute(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from pairs that rotate together (`llama` in GGUF) to two halves (rotate-half)."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


# -- the shape --------------------------------------------------------------------------------------------------------


def _config(reader: "_Reader", stored: dict[str, Any]) -> ModelConfig:
    if reader.architecture not in ("llama", "mimo2"):
        raise ValueError(f"architecture {reader.architecture!r} is not one of llama, mimo2")
    heads = int(reader.need("attention.head_count"))
    hidden = int(reader.need("embedding_length"))
    key = int(reader.get("attention.key_length", hidden // heads))
    rope = int(reader.get("rope.dimension_count", key))
    if reader.get("rope.scaling.type", "none") != "none" or "rope_freqs.weight" in stored:
        raise ValueError("scaled RoPE is not supported")
    values: dict[str, Any] = dict(
        vocab_size=int(stored["token_embd.weight"].shape[-1]) if "token_embd.weight" in stored else 0,
        hidden_size=hidden, intermediate_size=int(reader.need("feed_forward_length")),
        num_attention_heads=heads, swa_num_attention_heads=heads, head_dim=key, swa_head_dim=key,
        v_head_dim=int(reader.get("attention.value_length", key)), rope_theta=reader.get("rope.freq_base", 10_000.0),
        partial_rotary_factor=_factor(rope, key), rms_norm_eps=reader.need("attention.layer_norm_rms_epsilon"),
        max_position_embeddings=int(reader.need("context_length")), tie_word_embeddings="output.weight" not in stored,
    )
    values["swa_v_head_dim"] = values["v_head_dim"]
    for name, tokens in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        values[f"{name}_token_id"] = reader.field(f"tokenizer.ggml.{tokens}_token_id")
    specific = _llama if reader.architecture == "llama" else _mimo2
    return ModelConfig(**values | specific(reader, stored))


def _llama(reader: "_Reader", stored: dict[str, Any]) -> dict[str, Any]:
    layers, kv_heads = int(reader.need("block_count")), int(reader.need("attention.head_count_kv"))
    return dict(
        layer_types=(GLOBAL,) * layers, mlp_layer_types=(DENSE,) * layers, num_key_value_heads=kv_heads,
        swa_num_key_value_heads=kv_heads, swa_rope_theta=reader.get("rope.freq_base", 10_000.0), swa_sink=False,
    )


def _mimo2(reader: "_Reader", stored: dict[str, Any]) -> dict[str, Any]:
    mtp = int(reader.get("nextn_predict_layers", 0))
    blocks = int(reader.need("block_count"))
    kinds = [WINDOW if window else GLOBAL for window in reader.need("attention.sliding_window_pattern")]
    per_block = reader.need("attention.head_count_kv")
    kv = dict(zip(kinds, per_block if isinstance(per_block, list) else [per_block] * blocks, strict=True))
    window_blocks = [i for i, kind in enumerate(kinds) if kind == WINDOW]
    global_blocks = [i for i, kind in enumerate(kinds) if kind == GLOBAL]

    def has_sink(of: list[int]) -> bool:
        return bool(of) and f"blk.{of[0]}.attn_sinks.weight" in stored

    sparse = [f"blk.{i}.ffn_gate_inp.weight" in stored for i in range(blocks - mtp)]
    return dict(
        layer_types=tuple(kinds[: blocks - mtp]), mlp_layer_types=tuple(SPARSE if s else DENSE for s in sparse),
        num_key_value_heads=kv.get(GLOBAL, kv.get(WINDOW)), swa_num_key_value_heads=kv.get(WINDOW, kv.get(GLOBAL)),
        swa_sink=has_sink(window_blocks), global_sink=has_sink(global_blocks),
        swa_rope_theta=reader.get("rope.freq_base_swa", 10_000.0),
        sliding_window=int(reader.need("attention.sliding_window")),
        attention_value_scale=reader.get("attention.value_scale", 1.0), num_nextn_predict_layers=mtp,
        n_routed_experts=int(reader.get("expert_count", 0)),
        num_experts_per_tok=int(reader.get("expert_used_count", 0)),
        moe_intermediate_size=int(reader.get("expert_feed_forward_length", 0)),
    )


def _factor(rope: int, width: int) -> float:
    """rope / width, so that width x factor is not below rope once more by rounding."""
    factor = rope / width
    return factor if int(width * factor) == rope else math.nextafter(factor, math.inf)


class _Reader(gguf.GGUFReader):
    """`gguf.GGUFReader`, which makes an array for each string of a vocabulary (seconds), walking over long arrays."""

    _LONG = 2048

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        data = cast(memoryview, self.data)  # a buffer, as every array
        kind, length = struct.unpack_from("<IQ", data, orig_offs)
        if length < self._LONG:
            return super()._get_field_parts(orig_offs, raw_type)
        end = orig_offs + 12
        if kind == gguf.GGUFValueType.STRING:
            for _ in range(length):
                end += 8 + struct.unpack_from("<Q", data, end)[0]
        else:
            end += length * np.dtype(self.gguf_scalar_to_np[gguf.GGUFValueType(kind)]).itemsize
        return end - orig_offs, [], [], [gguf.GGUFValueType.ARRAY]

    @property
    def architecture(self) -> str:
        return str(self.field("general.architecture"))

    def field(self, key: str) -> Any:
        """A metadata value, None where absent; float32 in its shortest decimal form (1e-05, not 9.99999975e-06)."""
        if key not in self.fields:
            return None
        value = self.fields[key].contents()
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def get(self, key: str, default: Any) -> Any:
        value = self.field(f"{self.architecture}.{key}")
        return default if value is None else value

    def need(self, key: str) -> Any:
        value = self.get(key, None)
        if value is None:
            raise ValueError(f"{self.architecture}.{key} is missing")
        return value
