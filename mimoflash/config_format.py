"""The two published spellings of config.json, and Llama's, read into ModelConfig's fields and written from them.

The hub spelling (`hybrid_layer_pattern`, `swa_*`, `rope_theta`, `layernorm_epsilon`, ...) and the one of transformers 5
(`layer_types`, `rope_parameters`, `sliding_window`, ...) say the same things; Llama-type configs are points of the same
space (every layer global and dense). Where a file says a thing twice, the two must agree.
"""

import dataclasses
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mimoflash.config import ModelConfig

GLOBAL, WINDOW = "full_attention", "sliding_attention"
DENSE, SPARSE = "dense", "sparse"


def read(raw: dict[str, Any]) -> dict[str, Any]:
    """ModelConfig's fields from a config.json of either spelling, or of both. Raises ValueError naming the key."""
    if not isinstance(raw, dict):
        raise ValueError(f"a JSON object is expected, not {type(raw).__name__}")
    _check_types(raw)
    model_type = raw.get("model_type", "mimo_v2_flash")
    if model_type == "llama":
        return _read_llama(raw)
    if model_type in ("mimo_v2_flash", "mimo_v2"):
        return _read_mimo(raw)
    raise ValueError(f"model_type {model_type!r} is not one of mimo_v2_flash, mimo_v2, llama")


def write(c: "ModelConfig") -> dict[str, Any]:
    """Both spellings in one dictionary."""
    rope = {"rope_type": "default", "partial_rotary_factor": c.partial_rotary_factor}
    same = {field.name: getattr(c, field.name) for field in dataclasses.fields(c)}
    for own_name in ("swa_sink", "global_sink", "rms_norm_eps", "layer_types", "mlp_layer_types"):
        del same[own_name]
    hub = {
        "hybrid_layer_pattern": [int(kind == WINDOW) for kind in c.layer_types],
        "moe_layer_freq": [int(kind == SPARSE) for kind in c.mlp_layer_types],
        "sliding_window_size": c.sliding_window - 1,
        "add_swa_attention_sink_bias": c.swa_sink,
        "add_full_attention_sink_bias": c.global_sink,
        "layernorm_epsilon": c.rms_norm_eps,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_group": 1, "topk_group": 1,
        "n_shared_experts": None,
    }
    native = {
        "layer_types": list(c.layer_types),
        "mlp_layer_types": list(c.mlp_layer_types),
        "rope_parameters": {
            GLOBAL: rope | {"rope_theta": c.rope_theta}, WINDOW: rope | {"rope_theta": c.swa_rope_theta}
        },
        "rms_norm_eps": c.rms_norm_eps,
    }
    eos = list(c.eos_token_id) if isinstance(c.eos_token_id, tuple) else c.eos_token_id
    return {
        "architectures": ["MiMoV2FlashForCausalLM"], "model_type": "mimo_v2_flash",
        "num_hidden_layers": c.layers,
        "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0,
    } | same | hub | native | {"eos_token_id": eos}


# Keys that other programs write and that say nothing about the shape; everything else unknown is warned of, since a
# setting that is passed over in silence may give wrong logits.
_IGNORED = frozenset(
    "architectures auto_map model_type dtype torch_dtype transformers_version use_cache output_router_logits "
    "quantization_config attention_chunk_size _name_or_path name_or_path is_decoder return_dict output_hidden_states "
    "output_attentions chunk_size_feed_forward problem_type id2label label2id is_encoder_decoder "
    "tie_encoder_decoder attention_projection_layout pretraining_tp".split()
)
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "attention_dropout": (0, 0.0),
    "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "n_group": (1, None), "topk_group": (1, None),
    "n_shared_experts": (None, 0),
    "rope_scaling": (None, {"rope_type": "default"}, {"type": "default"}),
    "router_aux_loss_coef": (0, 0.0, None),
}


_COUNTS = (
    "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim", "sliding_window",
    "swa_num_attention_heads", "swa_num_key_value_heads", "swa_head_dim",
)
_LISTS = ("layer_types", "mlp_layer_types", "hybrid_layer_pattern", "moe_layer_freq")


def _check_types(raw: dict[str, Any]) -> None:
    """Of the values that are reckoned with before ModelConfig sees them."""
    for key in _COUNTS:
        value = raw.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{key} is {value!r}: a positive whole number is expected")
    previous = raw.get("sliding_window_size")
    if previous is not None and (not isinstance(previous, int) or previous < 0):
        raise ValueError(f"sliding_window_size is {previous!r}: a whole number from 0 on is expected")
    for key in _LISTS:
        value = raw.get(key)
        if value is not None and not (isinstance(value, list) and all(isinstance(item, str | int) for item in value)):
            raise ValueError(f"{key} is {value!r}: a list with an entry a layer is expected")


def _plain_rope(values: dict[str, Any], name: str) -> None:
    """Raises ValueError unless an object of RoPE settings asks for no scaling."""
    kind = values.get("rope_type", values.get("type", "default"))
    unknown = sorted(set(values) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"})
    if kind != "default" or unknown:
        key = unknown[0] if unknown else "rope_type"
        raise ValueError(f"{name} has {key} {values.get(key, kind)!r}: only plain RoPE is supported")


class _Reader:
    """Takes keys out of a raw config and reports contradictions and leftovers by their names."""

    def __init__(self, raw: dict[str, Any]):
        self.raw = {key: value for key, value in raw.items() if key not in _IGNORED}
        for key, allowed in _FIXED.items():
            if key in self.raw and self.raw.pop(key) not in allowed:
                raise ValueError(f"{key} is {raw[key]!r}; supported is {allowed[0]!r}")

    def take(self, key: str, default: Any = None) -> Any:
        value = self.raw.pop(key, None)
        return default if value is None else value

    def need(self, key: str) -> Any:
        value = self.take(key)
        if value is None:
            raise ValueError(f"{key} is missing")
        return value

    def either(self, first: tuple[str, Any], second: tuple[str, Any], default: Any) -> Any:
        """One value that may be spelled in two ways: (name, value) each, None where absent."""
        (name, value), (other_name, other) = first, second
        if value is not None and other is not None and value != other:
            raise ValueError(f"{name} says {value!r} but {other_name} says {other!r}")
        return default if value is None and other is None else other if value is None else value

    def finish(self) -> None:
        for key in sorted(key for key, value in self.raw.items() if value is not None):
            warnings.warn(f"config: unknown key {key!r} (value {self.raw[key]!r}) is passed over", stacklevel=2)


def window_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Window layers' heads where a config names only the global ones: as transformers fixes them."""
    return {
        "swa_num_attention_heads": values["num_attention_heads"],
        "swa_num_key_value_heads": 2 * values["num_key_value_heads"],
        "swa_head_dim": values["head_dim"],
        "swa_v_head_dim": values["v_head_dim"],
    }


def _read_common(r: _Reader) -> dict[str, Any]:
    eos = r.take("eos_token_id")
    return {
        "vocab_size": r.need("vocab_size"), "hidden_size": r.need("hidden_size"),
        "intermediate_size": r.need("intermediate_size"), "num_attention_heads": r.need("num_attention_heads"),
        "initializer_range": r.take("initializer_range", 0.02),
        "tie_word_embeddings": r.take("tie_word_embeddings", False),
        "max_position_embeddings": r.take("max_position_embeddings", 32_768), "bos_token_id": r.take("bos_token_id"),
        "eos_token_id": tuple(eos) if isinstance(eos, list) else eos, "pad_token_id": r.take("pad_token_id"),
        "num_nextn_predict_layers": r.take("num_nextn_predict_layers", 0),
    }


def _read_mimo(raw: dict[str, Any]) -> dict[str, Any]:
    r = _Reader(raw)
    values = _read_common(r) | {"head_dim": r.need("head_dim"), "num_key_value_heads": r.need("num_key_value_heads")}
    values["v_head_dim"] = r.take("v_head_dim", values["head_dim"])
    layers = r.need("num_hidden_layers")
    values |= {name: r.take(name, default) for name, default in window_defaults(values).items()}
    values |= {
        "layer_types": _layer_kinds(r, layers, "layer_types", "hybrid_layer_pattern", (GLOBAL, WINDOW)),
        "mlp_layer_types": _layer_kinds(r, layers, "mlp_layer_types", "moe_layer_freq", (DENSE, SPARSE)),
        "rms_norm_eps": r.either(
            ("rms_norm_eps", r.take("rms_norm_eps")), ("layernorm_epsilon", r.take("layernorm_epsilon")), 1e-5
        ),
        "sliding_window": _window(r),
        "swa_sink": r.take("add_swa_attention_sink_bias", True),
        "global_sink": r.take("add_full_attention_sink_bias", False),
        "attention_value_scale": r.take("attention_value_scale", 1.0),
        "n_routed_experts": r.take("n_routed_experts", 0),
        "num_experts_per_tok": r.take("num_experts_per_tok", 0),
        "moe_intermediate_size": r.take("moe_intermediate_size", 0),
        "norm_topk_prob": r.take("norm_topk_prob", True),
        "routed_scaling_factor": r.take("routed_scaling_factor", 1.0),
    } | _rope(r)
    r.finish()
    return values


def _layer_kinds(r: _Reader, layers: int, native: str, hub: str, kinds: tuple[str, str]) -> tuple[str, ...]:
    flags, named = r.take(hub), r.take(native)
    if flags is not None and not set(flags) <= {0, 1}:
        raise ValueError(f"{hub} holds {sorted(set(flags) - {0, 1})[0]!r}; known are 0 and 1")
    from_flags = None if flags is None else tuple(kinds[flag] for flag in flags)
    value = r.either((native, None if named is None else tuple(named)), (hub, from_flags), None)
    if value is None:
        raise ValueError(f"{native} (or {hub}) is missing")
    if len(value) != layers:
        name = hub if named is None else native
        raise ValueError(f"num_hidden_layers is {layers} but {name} has {len(value)} entries")
    return value


def _window(r: _Reader) -> int:
    """`sliding_window_size` counts previous positions and wins; `sliding_window` alone is the mask's width."""
    previous, width = r.take("sliding_window_size"), r.take("sliding_window")
    if previous is None:
        return 129 if width is None else width
    if width is not None and width not in (previous, previous + 1):
        raise ValueError(f"sliding_window_size says {previous} previous positions but sliding_window says {width}")
    return previous + 1


def _rope(r: _Reader) -> dict[str, Any]:
    native = r.take("rope_parameters", {})
    if not isinstance(native, dict):
        raise ValueError(f"rope_parameters is {native!r}: an object is expected")
    for kind, values in native.items():
        if kind not in (GLOBAL, WINDOW) or not isinstance(values, dict):
            raise ValueError(f"rope_parameters holds {kind!r}; known are {GLOBAL}, {WINDOW}, with an object each")
        _plain_rope(values, f"rope_parameters.{kind}")
    factors = {kind: v["partial_rotary_factor"] for kind, v in native.items() if "partial_rotary_factor" in v}
    if len(set(factors.values())) > 1:
        raise ValueError(f"rope_parameters: partial_rotary_factor differs between kinds of layer: {factors}")

    def theta(kind: str, key: str, default: float) -> float:
        spelled = native.get(kind, {}).get("rope_theta")
        return r.either((key, r.take(key)), (f"rope_parameters.{kind}.rope_theta", spelled), default)

    return {
        "rope_theta": theta(GLOBAL, "rope_theta", 5_000_000.0),
        "swa_rope_theta": theta(WINDOW, "swa_rope_theta", 10_000.0),
        "partial_rotary_factor": r.either(
            ("partial_rotary_factor", r.take("partial_rotary_factor")),
            ("rope_parameters.*.partial_rotary_factor", next(iter(factors.values()), None)),
            0.334,
        ),
    }


def _read_llama(raw: dict[str, Any]) -> dict[str, Any]:
    r = _Reader(raw)
    values = _read_common(r)
    heads = values["num_attention_heads"]
    kv_heads = r.take("num_key_value_heads", heads)
    head_dim = r.take("head_dim", values["hidden_size"] // heads)
    rope = r.take("rope_parameters", {})
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters is {rope!r}: an object is expected")
    _plain_rope(rope, "rope_parameters")
    theta = r.either(
        ("rope_theta", r.take("rope_theta")), ("rope_parameters.rope_theta", rope.get("rope_theta")), 10_000.0
    )
    layers = r.need("num_hidden_layers")
    values |= {
        "num_key_value_heads": kv_heads, "head_dim": head_dim, "v_head_dim": head_dim,
        "swa_num_attention_heads": heads, "swa_num_key_value_heads": kv_heads, "swa_head_dim": head_dim,
        "swa_v_head_dim": head_dim, "layer_types": (GLOBAL,) * layers, "mlp_layer_types": (DENSE,) * layers,
        "rope_theta": theta, "swa_rope_theta": theta, "partial_rotary_factor": 1.0, "swa_sink": False,
        "rms_norm_eps": r.take("rms_norm_eps", 1e-6),
    }
    r.finish()
    return values
