"""The model on a CPU by the compiled kernels (kernels/cpu): a whole pass, or a whole chain of drafts, is one call."""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimoflash.config import GLOBAL, WINDOW
from mimoflash.engine.cache import HybridCache, LayerCache
from mimoflash.engine.runner import RECENT, DraftNoise, Ints, Step, route_dtype
from mimoflash.kernels.native import KINDS, Matrix, Pointer, library, matrix
from mimoflash.kernels.quantize import quantise
from mimoflash.model import Transformer
from mimoflash.model.moe import MoE

WEIGHTS = {"float32": torch.float32, "bf16": torch.bfloat16, "int8": None, "int4": None}


def _fields(**types: Any) -> tuple[tuple[str, Any], ...]:
    return tuple((name, kind) for names, kind in types.items() for name in names.split("__"))


class _Shape(ctypes.Structure):
    """These structures are those of kernels/cpu/api.h, field by field."""

    _fields_ = _fields(
        heads__kv_heads__head_dim__v_head_dim__window__rope_half=ctypes.c_int32, rope_base=Pointer
    )


class _DenseFFN(ctypes.Structure):
    _fields_ = _fields(gate__up__down=Matrix)


class _MoE(ctypes.Structure):
    _fields_ = _fields(router=Matrix, bias__gate_up__down=Pointer)


class _Layer(ctypes.Structure):
    _fields_ = (
        *_fields(is_window__is_sparse=ctypes.c_int32, input_norm=Pointer, q__k__v__o=Matrix),
        *_fields(sink__post_norm=Pointer, dense=_DenseFFN, moe=_MoE, k_cache__v_cache=Pointer),
    )


class _MTPLayer(ctypes.Structure):
    _fields_ = _fields(enorm__hnorm__final_norm=Pointer, eh_proj=Matrix, block=_Layer)


class _Cache(ctypes.Structure):
    _fields_ = _fields(
        kind__drafts__max_pages__kept=ctypes.c_int32, page_table__hidden__mtp_start__mtp_end=Pointer
    )


class _Model(ctypes.Structure):
    _fields_ = (
        *_fields(hidden__intermediate__vocab__layer_count__moe_layers=ctypes.c_int32),
        *_fields(experts__per_token__expert_width__normalise=ctypes.c_int32),
        *_fields(epsilon__value_scale__routed_scaling=ctypes.c_float),
        *_fields(embedding_kind=ctypes.c_int32, embedding__layers__mtp__final_norm=Pointer),
        *_fields(head__draft_head=Matrix, draft_tokens=Pointer, shapes=_Shape * 2, cache=_Cache),
    )


class _Step(ctypes.Structure):
    _fields_ = _fields(
        sequences__tokens_count__logits_count__route_bytes=ctypes.c_int32,
        slots__starts__counts__tokens__logits_rows__lookahead__logits__routes=Pointer,
    )


class _DraftStep(ctypes.Structure):
    _fields_ = _fields(
        sequences__count=ctypes.c_int32, slots__positions__recent__temperature__seed__drafts=Pointer
    )


class NativeRunner:
    """See `Runner`; a row's result is the same to the last bit in whatever pass it is run.

    `weights`: "float32", "bf16", "int8" or "int4" (the head is int8 then). Matrices that are of this type already are
    read where they lie, others converted once and again by `refresh`; norms, routers and sinks are float32, the
    embedding stays as it is.
    `draft_tokens` (D,): the ids that may be drafted, those of the model's heads if not given. One call at a time.
    Raises ValueError for another kind of weights, and RuntimeError where there are no compiled kernels.
    """

    def __init__(
        self, model: Transformer, cache: HybridCache, *, weights: str = "float32",
        draft_tokens: Sequence[int] | Tensor | None = None, threads: int | None = None,
        kernels: ctypes.CDLL | None = None,
    ):  # fmt: skip
        if weights not in WEIGHTS:
            raise ValueError(f"weights is {weights!r}: it must be one of {', '.join(WEIGHTS)}")
        found = kernels or library()
        if found is None:
            raise RuntimeError("there are no compiled kernels: use TorchRunner")
        self.model, self.cache, self.weights, self.threads, self.kernels = model, cache, weights, threads, found
        ids = model.model.mtp.draft_tokens if draft_tokens is None else torch.as_tensor(draft_tokens)
        self.draft_tokens = None if ids is None else ids.to("cpu", torch.int32).contiguous()
        self.route_dtype = torch.from_numpy(np.empty(0, route_dtype(model.config))).dtype
        kept = RECENT + cache.drafts if cache.drafts else 0
        self.hidden = torch.zeros(cache.slots, kept, model.config.hidden_size)
        self._workspace = Pointer(found.mf_workspace())
        self.refresh()

    def __del__(self) -> None:
        if workspace := getattr(self, "_workspace", None):
            self.kernels.mf_release(workspace)

    @torch.no_grad()
    def refresh(self) -> None:
        builder = _Builder(self.model, self.cache, self.weights)
        self._native = builder.build(self.hidden, self.draft_tokens)
        self._kept = builder.kept  # what the structure points into

    def forward(self, step: Step) -> tuple[Tensor, Tensor]:
        """Raises ValueError for a token outside the vocabulary."""
        self._check(step)
        config = self.model.config
        logits = torch.empty(len(step.logits_rows), config.vocab_size)
        routes = torch.empty(
            len(step.tokens), len(config.moe_layers), config.num_experts_per_tok, dtype=self.route_dtype
        )
        inputs = [_int32(x) for x in (step.slots, step.starts, step.counts, step.tokens, step.logits_rows)]
        ahead = None if step.lookahead is None else _int32(step.lookahead)
        native = _Step(
            len(step.slots), len(step.tokens), len(step.logits_rows), routes.itemsize,
            *(x.ctypes.data for x in inputs), None if ahead is None else ahead.ctypes.data,
            logits.data_ptr(), routes.data_ptr(),
        )  # fmt: skip
        self._run(self.kernels.mf_forward, native)
        return logits, routes

    def draft(self, slots: Ints, positions: Ints, recent: Ints, count: int, noise: DraftNoise) -> Ints:
        assert 1 <= count <= self.cache.drafts, "each MTP layer drafts one token"
        assert recent.shape == (len(slots), RECENT)
        drafts = np.empty((len(slots), count), np.int32)
        inputs = [_int32(x) for x in (slots, positions, recent)]
        temperature = np.ascontiguousarray(noise.temperature, np.float32)
        seed = np.ascontiguousarray(noise.seed, np.uint64)
        arrays = [*inputs, temperature, seed, drafts]
        self._run(self.kernels.mf_draft, _DraftStep(len(slots), count, *(x.ctypes.data for x in arrays)))
        return drafts

    def _run(self, function: Any, step: ctypes.Structure) -> None:
        threads = self.threads or torch.get_num_threads()
        if function(ctypes.byref(self._native), self._workspace, ctypes.byref(step), threads):
            raise MemoryError("no memory for a pass of the model: run fewer tokens at a time")

    def _check(self, step: Step) -> None:
        size = self.model.config.vocab_size
        if not 0 <= step.tokens.min() <= step.tokens.max() < size:
            raise ValueError(f"a token is outside the vocabulary of {size}")
        assert step.counts.min() >= 1
        assert step.counts.sum() == len(step.tokens)
        assert step.starts.min() >= 0
        slots = step.slots.tolist()
        assert len(set(slots)) == len(slots), "a sequence runs once a pass"
        for slot, end in zip(slots, (step.starts + step.counts).tolist(), strict=True):
            assert end <= self.cache.capacity(slot), f"slot {slot} has no pages up to position {end}"


def _int32(values: Ints) -> Ints:
    return np.ascontiguousarray(values, np.int32)


class _Builder:
    """Makes the C structures from a model and keeps what they point into."""

    def __init__(self, model: Transformer, cache: HybridCache, weights: str):
        self.model, self.cache, self.weights = model, cache, weights
        self.kept: list[Any] = []

    def build(self, hidden: Tensor, draft_tokens: Tensor | None) -> _Model:
        c, trunk, caches = self.model.config, self.model.model, self.cache.layers
        layers = [
            self._layer(layer, layer.post_attention_layernorm, cache)
            for layer, cache in zip(trunk.layers, caches[: c.layers], strict=True)
        ]
        mtp = [self._mtp_layer(*each) for each in zip(trunk.mtp.layers, caches[c.layers :], strict=False)]
        # four bits in the head would go straight into the logits
        head = draft_head = self._matrix(self.model.lm_head.weight, "int8" if self.weights == "int4" else self.weights)
        if draft_tokens is not None:
            draft_head = self._matrix(self.model.lm_head.weight[draft_tokens.long()])
        embedding = self._keep(trunk.embed_tokens.weight.detach().contiguous())
        return _Model(
            c.hidden_size, c.intermediate_size, c.vocab_size, c.layers, len(c.moe_layers),
            c.n_routed_experts, c.num_experts_per_tok, c.moe_intermediate_size, c.norm_topk_prob,
            c.rms_norm_eps, c.attention_value_scale, c.routed_scaling_factor,
            KINDS[_name(embedding.dtype)], embedding.data_ptr(),
            self._array(_Layer, layers), self._array(_MTPLayer, mtp), self._floats(trunk.norm.weight),
            head, draft_head, None if draft_tokens is None else self._keep(draft_tokens).data_ptr(),
            (_Shape * 2)(self._shape(GLOBAL), self._shape(WINDOW)), self._cache(hidden),
        )  # fmt: skip

    def _layer(self, layer: Any, post_norm: Any, cache: LayerCache) -> _Layer:
        """Of the trunk, or an MTP layer's attention and feed-forward parts."""
        attention, ffn = layer.self_attn, layer.mlp
        sink = attention.attention_sink_bias
        native = _Layer(
            cache.window is not None, isinstance(ffn, MoE), self._floats(layer.input_layernorm.weight),
            *(self._matrix(getattr(attention, f"{name}_proj").weight) for name in "qkvo"),
            None if sink is None else self._floats(sink), self._floats(post_norm.weight),
        )  # fmt: skip
        if isinstance(ffn, MoE):
            router = matrix(self._keep(ffn.gate.weight.detach().float().contiguous()))
            gate_up, down = (
                self._array(Matrix, [self._matrix(weight) for weight in stacked])
                for stacked in (ffn.experts.gate_up_proj, ffn.experts.down_proj)
            )
            native.moe = _MoE(router, self._floats(ffn.gate.e_score_correction_bias), gate_up, down)
        else:
            native.dense = _DenseFFN(*(self._matrix(x.weight) for x in (ffn.gate_proj, ffn.up_proj, ffn.down_proj)))
        native.k_cache, native.v_cache = self._keep(cache.k).data_ptr(), self._keep(cache.v).data_ptr()
        return native

    def _mtp_layer(self, layer: Any, cache: LayerCache) -> _MTPLayer:
        norms = (self._floats(norm.weight) for norm in (layer.enorm, layer.hnorm, layer.final_layernorm))
        return _MTPLayer(*norms, self._matrix(layer.eh_proj.weight), self._layer(layer, layer.pre_mlp_layernorm, cache))

    def _cache(self, hidden: Tensor) -> _Cache:
        cache = self.cache
        table, start, end = (self._keep(x).ctypes.data for x in (cache.page_table, cache.mtp_start, cache.mtp_end))
        sizes = KINDS[_name(cache.dtype)], cache.drafts, cache.page_table.shape[1], hidden.shape[1]
        return _Cache(*sizes, table, self._keep(hidden).data_ptr(), start, end)

    def _shape(self, kind: str) -> _Shape:
        shape = self.model.config.attention(kind)
        # as model.attention.rope_angles has it
        exponents = torch.arange(0, shape.rope_dim, 2, dtype=torch.float32) / shape.rope_dim
        base = self._floats(shape.rope_theta**exponents)
        sizes = shape.heads, shape.kv_heads, shape.head_dim, shape.v_head_dim
        return _Shape(*sizes, shape.window or 0, shape.rope_dim // 2, base)

    def _matrix(self, weight: Tensor, kind: str | None = None) -> Matrix:
        """As a matrix of `kind`, that of all weights if not given."""
        kind, weight = kind or self.weights, weight.detach()
        if (dtype := WEIGHTS[kind]) is None:
            return matrix(self._keep(quantise(weight, kind)))
        return matrix(self._keep(weight.to(dtype).contiguous()))

    def _floats(self, values: Tensor) -> int:
        return self._keep(values.detach().float().contiguous()).data_ptr()

    def _array(self, kind: Any, values: list[Any]) -> int:
        return ctypes.addressof(self._keep((kind * len(values))(*values)))

    def _keep(self, value: Any) -> Any:
        self.kept.append(value)
        return value


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
