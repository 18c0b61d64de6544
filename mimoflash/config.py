"""The shape of a model, and what follows from it: parameters, FLOPs, cache bytes (spellings: config_format.py)."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimoflash import config_format
from mimoflash.config_format import DENSE, GLOBAL, SPARSE, WINDOW


@dataclass(frozen=True)
class AttentionShape:
    """One kind of attention layer. `window`: positions attended, the query's own included; None: all before."""

    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    window: int | None
    rope_dim: int
    rope_theta: float
    sink: bool

    @property
    def projection_parameters(self) -> int:
        """Columns of q, k, v and rows of o together; times the hidden size, it is the number of weights."""
        return self.heads * (self.head_dim + self.v_head_dim) + self.kv_heads * (self.head_dim + self.v_head_dim)


@dataclass(frozen=True)
class ModelConfig:
    """A hybrid-attention mixture-of-experts transformer (arXiv 2601.02780, section 2; defaults that the report fixes).

    `sliding_window` is the mask's width: 128 previous positions and the query itself are 129.
    Raises ValueError, naming the key, where values contradict each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layer_types: tuple[str, ...]
    mlp_layer_types: tuple[str, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    v_head_dim: int
    swa_num_attention_heads: int
    swa_num_key_value_heads: int
    swa_head_dim: int
    swa_v_head_dim: int
    rope_theta: float = 5_000_000.0
    swa_rope_theta: float = 10_000.0
    partial_rotary_factor: float = 0.334
    sliding_window: int = 129
    swa_sink: bool = True
    global_sink: bool = False
    attention_value_scale: float = 1.0
    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    num_nextn_predict_layers: int = 0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.006
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32_768
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("layer_types", "mlp_layer_types"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _check(self)

    # -- construction ---------------------------------------------------------------------------------------------

    @classmethod
    def tiny(cls, **changes: Any) -> "ModelConfig":
        """A model of a few ten thousand parameters with every feature of the architecture; `changes` override."""
        values: dict[str, Any] = dict(
            vocab_size=128, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=1,
            head_dim=24, v_head_dim=16, sliding_window=9, attention_value_scale=0.707,
            layer_types=(GLOBAL, WINDOW, WINDOW, GLOBAL), mlp_layer_types=(DENSE, SPARSE, SPARSE, SPARSE),
            n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, max_position_embeddings=1024,
            initializer_range=0.05,
        ) | changes
        return cls(**(config_format.window_defaults(values) | values))

    @classmethod
    def flash(cls) -> "ModelConfig":
        """The published MiMo-V2-Flash: 309 B parameters, 15 B of them active a token (context extended to 256 k)."""
        layers = 48
        return cls(
            vocab_size=152_576, hidden_size=4096, intermediate_size=16_384,
            layer_types=tuple(GLOBAL if i == 0 or (i + 1) % 6 == 0 else WINDOW for i in range(layers)),
            mlp_layer_types=(DENSE, *[SPARSE] * (layers - 1)),
            num_attention_heads=64, num_key_value_heads=4, head_dim=192, v_head_dim=128,
            swa_num_attention_heads=64, swa_num_key_value_heads=8, swa_head_dim=192, swa_v_head_dim=128,
            attention_value_scale=0.707, n_routed_experts=256, num_experts_per_tok=8, moe_intermediate_size=2048,
            num_nextn_predict_layers=3, max_position_embeddings=262_144,
        )

    @classmethod
    def load(cls, path: str | Path) -> "ModelConfig":
        """Reads a config.json, or the one in a folder. Raises ValueError, naming file and key, if it cannot be used."""
        file = Path(path)
        file = file / "config.json" if file.is_dir() else file
        try:
            return cls.from_dict(json.loads(file.read_text()))
        except FileNotFoundError:
            raise ValueError(f"{file}: no such file; a model folder needs a config.json") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: not JSON: {error}") from None
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "ModelConfig":
        """Reads either spelling (or both at once, where they agree)."""
        return cls(**config_format.read(raw))

    # -- writing --------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Both spellings in one dictionary; from_dict gives the same config back, and so does transformers."""
        return config_format.write(self)

    def save(self, path: str | Path) -> None:
        """Writes config.json into the folder (made if missing), or to the path if it ends in .json."""
        file = Path(path)
        file = file if file.suffix == ".json" else file / "config.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    # -- what follows from the numbers ----------------------------------------------------------------------------

    @property
    def layers(self) -> int:
        return len(self.layer_types)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers with experts: the axis of replayed routes (a dense first layer has no place in it)."""
        return tuple(i for i, kind in enumerate(self.mlp_layer_types) if kind == SPARSE)

    def attention(self, kind: str) -> AttentionShape:
        """The attention of GLOBAL or WINDOW layers; MTP layers have WINDOW's."""
        window = kind == WINDOW
        head_dim = self.swa_head_dim if window else self.head_dim
        return AttentionShape(
            heads=self.swa_num_attention_heads if window else self.num_attention_heads,
            kv_heads=self.swa_num_key_value_heads if window else self.num_key_value_heads,
            head_dim=head_dim,
            v_head_dim=self.swa_v_head_dim if window else self.v_head_dim,
            window=self.sliding_window if window else None,
            rope_dim=int(head_dim * self.partial_rotary_factor),
            rope_theta=self.swa_rope_theta if window else self.rope_theta,
            sink=self.swa_sink if window else self.global_sink,
        )

    def _attentions(self) -> Iterator[AttentionShape]:
        return (self.attention(kind) for kind in self.layer_types)

    def count_parameters(self) -> dict[str, int]:
        """`total`: the trunk with embedding and head; `active`: what one token multiplies or looks up in it (its own
        experts, the head, norms and routers; of the embedding one row); `mtp`: the MTP layers, in neither."""
        h = self.hidden_size
        attention = sum(a.projection_parameters * h + a.heads * a.sink for a in self._attentions())
        expert = 3 * h * self.moe_intermediate_size
        router = (h + 1) * self.n_routed_experts  # weight and correction bias
        moe, dense = len(self.moe_layers), (self.layers - len(self.moe_layers)) * 3 * h * self.intermediate_size
        shared = attention + dense + moe * router + (2 * self.layers + 1) * h
        head = h * self.vocab_size
        w = self.attention(WINDOW)
        mtp = (2 * h + w.projection_parameters + 3 * self.intermediate_size + 5) * h + w.heads * w.sink
        return {
            "total": shared + moe * self.n_routed_experts * expert + head * (1 if self.tie_word_embeddings else 2),
            "active": shared + moe * self.num_experts_per_tok * expert + head + h,
            "mtp": self.num_nextn_predict_layers * mtp,
        }

    def flops_per_token(self, length: int, *, mtp_layers: int = 0) -> float:
        """Forward FLOPs of one token in a causal sequence of `length`, averaged over its positions: 2 a weight
        multiplied, plus attention's two products over the positions really attended. Training costs
        three times as much."""
        h = self.hidden_size
        kinds = [*self._attentions(), *[self.attention(WINDOW)] * mtp_layers]
        weights = sum(a.projection_parameters * h for a in kinds)
        weights += (self.layers - len(self.moe_layers) + mtp_layers) * 3 * h * self.intermediate_size
        weights += len(self.moe_layers) * h * (
            self.n_routed_experts + 3 * self.moe_intermediate_size * self.num_experts_per_tok
        )
        weights += (1 + mtp_layers) * h * self.vocab_size + mtp_layers * 2 * h * h
        scores = sum(a.heads * (a.head_dim + a.v_head_dim) * _mean_attended(length, a.window) for a in kinds)
        return 2.0 * (weights + scores)

    def kv_bytes(self, length: int, *, bytes_per_value: int = 2, mtp_layers: int = 0) -> int:
        """Bytes of one sequence's cache after `length` positions: window layers keep the window only, key and value at
        their own widths."""
        kinds = [*self._attentions(), *[self.attention(WINDOW)] * mtp_layers]
        values = sum(a.kv_heads * (a.head_dim + a.v_head_dim) * min(length, a.window or length) for a in kinds)
        return values * bytes_per_value


def _mean_attended(length: int, window: int | None) -> float:
    """Positions that a causal query attends, its own included, averaged over a sequence."""
    w = min(length, window or length)
    return (w * (w + 1) / 2 + (length - w) * w) / length


# -- checks -----------------------------------------------------------------------------------------------------------


def _check(c: ModelConfig) -> None:
    positive = (
        "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
        "v_head_dim", "swa_num_attention_heads", "swa_num_key_value_heads", "swa_head_dim", "swa_v_head_dim",
        "sliding_window", "max_position_embeddings",
    )
    for name in positive:
        if not _is_int(getattr(c, name)) or getattr(c, name) < 1:
            raise ValueError(f"{name} is {getattr(c, name)!r}: a positive whole number is expected")
    for name in ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "num_nextn_predict_layers"):
        if not _is_int(getattr(c, name)) or getattr(c, name) < 0:
            raise ValueError(f"{name} is {getattr(c, name)!r}: a whole number from 0 on is expected")
    for name in ("rope_theta", "swa_rope_theta", "attention_value_scale", "rms_norm_eps", "routed_scaling_factor"):
        value = getattr(c, name)
        if not _is_number(value) or not math.isfinite(value) or value <= 0:
            raise ValueError(f"{name} is {value!r}: a positive number is expected")
    for name in ("norm_topk_prob", "tie_word_embeddings", "swa_sink", "global_sink"):
        if not isinstance(getattr(c, name), bool):
            raise ValueError(f"{name} is {getattr(c, name)!r}: true or false is expected")
    if not _is_number(c.initializer_range) or not c.initializer_range > 0:
        raise ValueError(f"initializer_range is {c.initializer_range!r}: a positive number is expected")
    _check_layers(c)
    _check_attention(c)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(c, name)
        for token in value if isinstance(value, tuple) else (value,):
            if token is not None and (not _is_int(token) or not 0 <= token < c.vocab_size):
                raise ValueError(f"{name} is {token!r}, outside the vocabulary (vocab_size {c.vocab_size})")


def _check_layers(c: ModelConfig) -> None:
    if not c.layer_types:
        raise ValueError("layer_types is empty: a model needs a layer")
    for name, kinds in (("layer_types", (GLOBAL, WINDOW)), ("mlp_layer_types", (DENSE, SPARSE))):
        for value in getattr(c, name):
            if value not in kinds:
                raise ValueError(f"{name} holds {value!r}; known are {', '.join(kinds)}")
    if len(c.mlp_layer_types) != len(c.layer_types):
        raise ValueError(f"mlp_layer_types has {len(c.mlp_layer_types)} entries but layer_types {len(c.layer_types)}")
    if SPARSE in c.mlp_layer_types:
        for name in ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"):
            if getattr(c, name) < 1:
                raise ValueError(f"{name} is {getattr(c, name)} but mlp_layer_types has sparse layers")
    if c.num_experts_per_tok > c.n_routed_experts:
        raise ValueError(
            f"num_experts_per_tok is {c.num_experts_per_tok} but there are only {c.n_routed_experts} experts "
            "(n_routed_experts)"
        )


def _check_attention(c: ModelConfig) -> None:
    for prefix in ("", "swa_"):
        heads, kv = getattr(c, prefix + "num_attention_heads"), getattr(c, prefix + "num_key_value_heads")
        if heads % kv:
            raise ValueError(f"{prefix}num_key_value_heads is {kv}, which does not divide the {heads} query heads")
        width, factor = getattr(c, prefix + "head_dim"), c.partial_rotary_factor
        rope = int(width * factor) if _is_number(factor) and math.isfinite(factor) else 0
        if rope < 2 or rope % 2 or rope > width:
            raise ValueError(
                f"partial_rotary_factor is {factor!r}: of {prefix}head_dim {width} it rotates {rope} dimensions; "
                "an even number from 2 on is needed"
            )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
