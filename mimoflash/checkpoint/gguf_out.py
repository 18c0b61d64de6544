"""Writing a model as GGUF, so that llama.cpp runs it with the same tokens: `mimo2`, MTP layers included, or `llama`
where every layer is global."""

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from torch import Tensor

from mimoflash.checkpoint.files import sync
from mimoflash.checkpoint.gguf_layout import gguf_tensors
from mimoflash.config import GLOBAL, WINDOW, ModelConfig
from mimoflash.model import Transformer

_KINDS = {
    "float32": (Kind.F32, gguf.LlamaFileType.ALL_F32),
    "float16": (Kind.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (Kind.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_1": (Kind.Q4_1, gguf.LlamaFileType.MOSTLY_Q4_1),
}
_UNUSED = 5  # tokenizer.ggml.token_type of rows of the embedding that no token has


def save_gguf(
    model: Transformer, file: str | Path, *, dtype: str = "bf16", tokenizer: Mapping[str, Any] | None = None,
    name: str = "mimoflash",
) -> None:
    """Writes `file`, whole or not at all, tensor by tensor.

    `dtype`: float32, float16, bf16, q8_0 or q4_1, of the matrices; norms, sinks and routers are float32 always, and a
    quantised matrix whose rows are no multiple of 32 is float16. `tokenizer`: the `tokenizer.*` metadata
    (`Tokenizer.gguf_fields()`); without it llama.cpp runs on token ids only.
    Raises ValueError where the format cannot hold the model.
    """
    if dtype not in _KINDS:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(_KINDS)}")
    kind, file_type = _KINDS[dtype]
    architecture = gguf_architecture(model.config)
    target = Path(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".new-{target.name}-{uuid.uuid4().hex[:8]}")
    try:
        writer = gguf.GGUFWriter(temporary, architecture)
        writer.add_name(name)
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_shape(writer, model.config)
        if architecture == "mimo2":
            _add_mimo2_shape(writer, model.config)
        _add_tokenizer(writer, model.config.vocab_size, tokenizer)
        tensors = _mimo2_tensors(model) if architecture == "mimo2" else _llama_tensors(model)
        for tensor_name, views in tensors.items():
            shape = (sum(view.shape[0] for view in views), *views[0].shape[1:])
            stored = _kind(tensor_name, shape, kind)
            block, width = gguf.GGML_QUANT_SIZES[stored]
            writer.add_tensor_info(
                tensor_name, shape, np.dtype(np.float32), int(np.prod(shape)) // block * width, raw_dtype=stored
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor_name, views in tensors.items():
            values = torch.cat([view.float().cpu() for view in views])
            if "ffn_down_exps" in tensor_name:  # llama.cpp knows no scale of the experts' weights in this architecture
                values *= model.config.routed_scaling_factor
            writer.write_tensor_data(_encode(tensor_name, values, _kind(tensor_name, tuple(values.shape), kind)))
        writer.close()
        sync(temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def gguf_architecture(c: ModelConfig) -> str:
    """`mimo2`, or `llama` where all layers are global and dense. ValueError where llama.cpp cannot express the config
    in it, before anything is written."""
    if WINDOW in c.layer_types:
        _check_mimo2(c)
        return "mimo2"
    _check_llama(c)
    return "llama"


def _check_mimo2(c: ModelConfig) -> None:
    for own in ("num_attention_heads", "head_dim", "v_head_dim"):
        if getattr(c, own) != getattr(c, f"swa_{own}"):
            raise ValueError(
                f"GGUF's mimo2 has one {own} for all layers, but swa_{own} is {getattr(c, f'swa_{own}')} "
                f"and {own} {getattr(c, own)}"
            )
    if c.moe_layers and not c.norm_topk_prob:
        raise ValueError("llama.cpp normalises the experts' weights in mimo2, but norm_topk_prob is false")


def _check_llama(c: ModelConfig) -> None:
    wrong = {
        "mlp_layer_types has sparse layers": bool(c.moe_layers),
        "global_sink is true": c.global_sink,
        f"v_head_dim is {c.v_head_dim} and head_dim {c.head_dim}": c.v_head_dim != c.head_dim,
        f"partial_rotary_factor is {c.partial_rotary_factor}": c.attention(GLOBAL).rope_dim != c.head_dim,
        f"attention_value_scale is {c.attention_value_scale}": c.attention_value_scale != 1.0,
        f"num_nextn_predict_layers is {c.num_nextn_predict_layers}": c.num_nextn_predict_layers > 0,
    }
    for what, is_wrong in wrong.items():
        if is_wrong:
            raise ValueError(
                "without window layers (layer_types) a model is written as GGUF's llama: dense, fully rotated, without "
                f"sinks, value scale and MTP layers; but {what}"
            )


def _mimo2_tensors(model: Transformer) -> dict[str, tuple[Tensor, ...]]:
    """As llama.cpp wants them: MTP blocks with fused qkv, a head even where it is tied."""
    tensors = gguf_tensors(model, lambda block: block >= model.config.layers)
    return {"output.weight": tensors["token_embd.weight"]} | tensors


def _llama_tensors(model: Transformer) -> dict[str, tuple[Tensor, ...]]:
    """Rows of q and k go from two halves of a head (rotate-half) to pairs that rotate together."""
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    tensors = gguf_tensors(model, lambda block: False)
    for name, (view,) in tensors.items():
        if name.split(".")[-2] in heads:
            halves = view.unflatten(0, (heads[name.split(".")[-2]], 2, -1))  # (heads, 2, D / 2, H)
            tensors[name] = (halves.transpose(1, 2).flatten(0, 2),)
    return tensors


def _add_shape(writer: gguf.GGUFWriter, c: ModelConfig) -> None:
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_vocab_size(c.vocab_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.v_head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_dimension_count(c.attention(GLOBAL).rope_dim)
    writer.add_rope_freq_base(c.rope_theta)
    kinds = [*c.layer_types, *[WINDOW] * c.num_nextn_predict_layers]
    writer.add_block_count(len(kinds))
    per_layer = [c.attention(kind).kv_heads for kind in kinds]
    writer.add_head_count_kv(per_layer if WINDOW in kinds else c.num_key_value_heads)


def _add_mimo2_shape(writer: gguf.GGUFWriter, c: ModelConfig) -> None:
    kinds = [*c.layer_types, *[WINDOW] * c.num_nextn_predict_layers]
    writer.add_float32("mimo2.rope.freq_base_swa", c.swa_rope_theta)
    writer.add_sliding_window(c.sliding_window)  # llama.cpp counts the query's own position too
    writer.add_sliding_window_pattern([kind == WINDOW for kind in kinds])
    writer.add_float32("mimo2.attention.value_scale", c.attention_value_scale)
    writer.add_expert_count(c.n_routed_experts)
    writer.add_expert_used_count(c.num_experts_per_tok)
    writer.add_expert_feed_forward_length(c.moe_intermediate_size)
    writer.add_expert_weights_norm(c.norm_topk_prob)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if c.num_nextn_predict_layers:
        writer.add_nextn_predict_layers(c.num_nextn_predict_layers)


def _add_tokenizer(writer: gguf.GGUFWriter, vocabulary: int, fields: Mapping[str, Any] | None) -> None:
    if fields is None:
        writer.add_tokenizer_model("none")
        return
    tokens = list(fields["tokenizer.ggml.tokens"])
    if len(tokens) > vocabulary:
        raise ValueError(f"the tokenizer has {len(tokens)} tokens, the model's vocabulary only {vocabulary}")
    spare = range(len(tokens), vocabulary)
    fields = dict(fields) | {
        "tokenizer.ggml.tokens": [*tokens, *(f"[PAD{index}]" for index in spare)],
        "tokenizer.ggml.token_type": [*fields["tokenizer.ggml.token_type"], *[_UNUSED] * len(spare)],
    }
    for key, value in fields.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)


def _kind(name: str, shape: tuple[int, ...], kind: Kind) -> Kind:
    """The type that a tensor is stored in."""
    if len(shape) == 1 or "ffn_gate_inp" in name:
        return Kind.F32
    return Kind.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def _encode(name: str, values: Tensor, kind: Kind) -> NDArray[Any]:
    if kind == Kind.F16 and values.abs().max() > torch.finfo(torch.float16).max:
        raise ValueError(f"{name} has values beyond float16: choose bf16 or float32")
    if kind == Kind.BF16:
        return values.bfloat16().view(torch.uint8).numpy()
    return gguf.quants.quantize(values.numpy(), kind)
