"""Which GGUF tensor is which part of a model: llama.cpp's names for `llama` and for this family, `mimo2`.

llama.cpp counts multi-token-prediction layers as blocks behind the trunk's, and runs them only where their q, k and v
are one tensor.
"""

from collections.abc import Callable

from torch import Tensor

from mimoflash.checkpoint.layout import EMBEDDING, LM_HEAD
from mimoflash.model import Transformer
from mimoflash.model.moe import MoE

_OUTSIDE = {"token_embd.weight": EMBEDDING, "output_norm.weight": "model.norm.weight", "output.weight": LM_HEAD}
_ATTENTION = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_sinks.weight": "self_attn.attention_sink_bias",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_TRUNK = _ATTENTION | {
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
}
_MTP = _ATTENTION | {
    "ffn_norm.weight": "pre_mlp_layernorm.weight",
    "nextn.eh_proj.weight": "eh_proj.weight",
    "nextn.enorm.weight": "enorm.weight",
    "nextn.hnorm.weight": "hnorm.weight",
    "nextn.shared_head_norm.weight": "final_layernorm.weight",
}
_QKV = ("attn_q.weight", "attn_k.weight", "attn_v.weight")


def gguf_tensors(model: Transformer, is_fused: Callable[[int], bool]) -> dict[str, tuple[Tensor, ...]]:
    """Every GGUF tensor by name, as the views of the model whose rows it holds one after the other: one view, or q, k
    and v in a block that `is_fused`. Experts are stacked in GGUF as in the model."""
    ours = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    tensors: dict[str, tuple[Tensor, ...]] = {name: (ours[own],) for name, own in _OUTSIDE.items()}
    if model.config.tie_word_embeddings:
        del tensors["output.weight"]
    trunk, mtp = model.config.layers, model.config.num_nextn_predict_layers
    for block in range(trunk + mtp):
        names = _TRUNK if block < trunk else _MTP
        prefix = f"model.layers.{block}." if block < trunk else f"model.mtp.layers.{block - trunk}."
        held: dict[str, tuple[Tensor, ...]] = {
            name: (ours[prefix + own],) for name, own in names.items() if prefix + own in ours
        }
        if is_fused(block):
            held["attn_qkv.weight"] = tuple(held.pop(name)[0] for name in _QKV)
        mlp = model.model.layers[block].mlp if block < trunk else None
        if isinstance(mlp, MoE):
            gate, up = mlp.experts.gate_up_proj.detach().chunk(2, dim=1)
            stacked = {"gate": gate, "up": up, "down": mlp.experts.down_proj.detach()}
            held |= {f"ffn_{name}_exps.weight": (view,) for name, view in stacked.items()}
        tensors |= {f"blk.{block}.{name}": views for name, views in held.items()}
    return tensors
