"""Decoding on CUDA: steps of a few tokens a sequence by Triton kernels, in CUDA graphs; prompts by PyTorch's runner.

Nothing in a recorded pass depends on the host: page tables, positions and tokens are tensors that are overwritten in
place, routes stay on the device until the pass is over. It runs on a CPU too, operation by operation, for tests.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mimoflash.config import WINDOW
from mimoflash.engine.cache import PAGE, HybridCache
from mimoflash.engine.fp8 import FP8Experts, quantised, requantise
from mimoflash.engine.graphs import Graphs, Inputs, Outputs
from mimoflash.engine.runner import NO_FILL, RECENT, DraftNoise, Ints, Step, TorchRunner
from mimoflash.engine.sampling import exponential_noise
from mimoflash.kernels.grouped import decode_experts
from mimoflash.kernels.paged_attention import has_triton, paged_attention, rotate_and_store
from mimoflash.model import Transformer
from mimoflash.model.attention import Attention, Rope, rope_angles, rotate
from mimoflash.model.moe import MoE

BATCHES = (1, 2, 4, 8, 16, 32, 64)  # sequences of a recorded pass; fewer are filled up with empty ones


class CudaRunner(TorchRunner):
    """A Runner (see `runner.Runner`) for a model on a GPU.

    Sequences with at most 1 + drafts new tokens (decoding, verification) run as one recorded pass; what is left of the
    step, and the filling of MTP layers over prompts, is TorchRunner's. `fp8`: matrices become e4m3 in blocks of
    128 x 128, as in the published checkpoint, the rest `dtype` (bfloat16 if not given). `graphs` False: no recording.
    """

    def __init__(
        self, model: Transformer, cache: HybridCache, *, dtype: torch.dtype | None = None, fp8: bool = False,
        graphs: bool = True,
    ):
        used = quantised(model, dtype or torch.bfloat16) if fp8 else model
        super().__init__(used, cache, dtype=None if fp8 else dtype)
        self.source, self.is_fp8 = model, fp8
        self.layers: list[Any] = list(self.model.model.layers)
        # one slot more: what sequences that only fill up the batch leave goes there
        self.hidden = torch.cat([self.hidden, self.hidden[:1]])
        ids = self.draft_tokens
        self.draft_head = self.model.lm_head.weight if ids is None else self.model.lm_head.weight[ids]
        self.graphs = Graphs(self.device, enabled=graphs and has_triton(self.device))
        self.inputs: dict[tuple[int, int], Inputs] = {}
        self.draft_inputs: dict[int, Inputs] = {}

    @torch.inference_mode()
    def refresh(self) -> None:
        if self.is_fp8:
            requantise(self.source, self.model)
        else:
            super().refresh()
        if self.draft_tokens is not None:
            self.draft_head.copy_(self.model.lm_head.weight[self.draft_tokens])

    # -- the trunk ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def forward(self, step: Step) -> tuple[Tensor, Tensor]:
        is_few = step.counts <= 1 + self.cache.drafts
        if step.lookahead is not None and self.cache.drafts:
            is_few &= step.lookahead[:, 0] == NO_FILL
        (few,), (rest,) = is_few.nonzero(), (~is_few).nonzero()
        if not len(few):
            return super().forward(step)
        if not len(rest) and len(few) <= BATCHES[-1]:
            return self._decode(step)
        config = self.model.config
        shape = len(step.tokens), len(config.moe_layers), config.num_experts_per_tok
        routes = torch.empty(shape, dtype=self.route_dtype)
        logits = torch.empty(len(step.logits_rows), config.vocab_size, device=self.device)
        for start in range(0, len(few), BATCHES[-1]):
            part, rows = _part(step, few[start : start + BATCHES[-1]])
            self._place(step, rows, *self._decode(part), logits, routes)
        if len(rest):
            part, rows = _part(step, rest)
            self._place(step, rows, *super().forward(part), logits, routes)
        return logits, routes

    def _place(
        self, step: Step, rows: Ints, part_logits: Tensor, part_routes: Tensor, logits: Tensor, routes: Tensor
    ) -> None:
        """A part's results into those of the step; `rows` (T of the part,) are its tokens in the step."""
        routes[torch.from_numpy(rows).long()] = part_routes
        (wanted,) = np.isin(step.logits_rows, rows).nonzero()
        logits[torch.from_numpy(wanted).to(self.device)] = part_logits

    def _decode(self, step: Step) -> tuple[Tensor, Tensor]:
        """`forward` of at most BATCHES[-1] sequences with at most 1 + drafts tokens each."""
        size, length = len(step.slots), int(step.counts.max())
        batch = next(size_ for size_ in BATCHES if size_ >= size)
        inputs = self._inputs(batch, length)
        host = inputs.host()
        places = np.arange(length)
        real = places < step.counts[:, None]  # (S, L)
        rows = (np.cumsum(step.counts) - step.counts)[:, None] + places
        for name, values in (("slots", step.slots), ("starts", step.starts), ("counts", step.counts)):
            host[name][:size], host[name][size:] = values, 0
        host["tokens"][:size] = np.where(real, step.tokens[np.where(real, rows, 0)], 0)
        pages = 0
        if self.cache.has_pages:
            pages = -(-int((step.starts + step.counts).max()) // PAGE)
            host["table"][:pages, :size] = self.cache.page_table[step.slots, :pages].T
        inputs.send(unused=(len(host["table"]) - pages) * batch)
        logits, routes = self.graphs.run(("decode", batch, length), lambda: self._decode_pass(inputs.device))
        sequence, place = np.nonzero(real)
        at = (sequence * length + place)[step.logits_rows]
        logits = logits[torch.from_numpy(at).to(self.device)]
        return logits, routes[:size].cpu()[torch.from_numpy(real)]

    def _inputs(self, batch: int, length: int) -> Inputs:
        if (batch, length) not in self.inputs:
            table = (self.cache.page_table.shape[1], batch)  # so that pages in use come first
            shapes = dict(slots=(batch,), starts=(batch,), counts=(batch,), tokens=(batch, length), table=table)
            self.inputs[batch, length] = Inputs(shapes, self.device)
        return self.inputs[batch, length]

    def _decode_pass(self, inputs: dict[str, Tensor]) -> Outputs:
        """Logits (B * L, V) float32 and routes (B, L, MoE layers, K), from tensors alone: this is what is recorded."""
        starts, counts, tokens = inputs["starts"], inputs["counts"], inputs["tokens"]
        offsets = torch.arange(tokens.shape[1], device=self.device)
        real = offsets < counts[:, None]  # (B, L)
        positions = (starts[:, None] + offsets).masked_fill(~real, -1)
        x = self.model.model.embed_tokens(tokens)
        ropes = self.model.ropes(positions, x.dtype)
        routes = []
        for layer in self.layers:
            x = x + self._attention(layer.self_attn, layer.input_layernorm(x), positions, ropes[layer.kind], inputs)
            normed = layer.post_attention_layernorm(x)
            if isinstance(layer.mlp, MoE):
                y, chosen = _experts(layer.mlp, normed, real)
                routes.append(chosen)
                x = x + y
            else:
                x = x + layer.mlp(normed)
        if self.cache.drafts:
            slots = inputs["slots"][:, None].masked_fill(~real, self.cache.slots)
            self.hidden[slots, positions % self.hidden.shape[1]] = x
        none = tokens.new_empty(*tokens.shape, 0, self.model.config.num_experts_per_tok)
        chosen = torch.stack(routes, 2) if routes else none
        return self.model.logits(x.flatten(0, 1)).float(), chosen.to(self.route_dtype)

    def _attention(
        self, attention: Attention, x: Tensor, positions: Tensor, rope: Rope, inputs: dict[str, Tensor]
    ) -> Tensor:
        """As the module's own forward, over the engine's cache."""
        shape, cached = attention.shape, self.cache.layers[attention.layer]
        q, k, v = _heads(attention, x)
        units = inputs["table"].T if shape.window is None else inputs["slots"]
        rotate_and_store(q, k, v, rope, positions, cached.k, cached.v, units, attention.value_scale)
        out = paged_attention(
            q, cached.k, cached.v, units, inputs["starts"], inputs["counts"], window=shape.window,
            sink=attention.attention_sink_bias,
        )
        return attention.o_proj(out.flatten(2))

    # -- MTP layers -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def draft(self, slots: Ints, positions: Ints, recent: Ints, count: int, noise: DraftNoise) -> Ints:
        cache, drafted = self.cache, np.empty((len(slots), count), np.int32)
        oldest = positions - (RECENT - cache.drafts)  # see TorchRunner.draft
        gap = cache.mtp_end[slots] < oldest
        cache.mtp_start[slots] = np.where(gap, oldest, cache.mtp_start[slots])
        ends = np.where(gap, oldest, np.minimum(cache.mtp_end[slots], positions))
        for start in range(0, len(slots), BATCHES[-1]):
            part = slice(start, start + BATCHES[-1])
            values = {
                "slots": slots, "positions": positions, "firsts": cache.mtp_start[slots], "ends": ends,
                "recent": recent, "seeds": noise.seed.view(np.int64),
                "temperatures": noise.temperature.astype(np.float64).view(np.int64),
            }
            drafted[part] = self._draft({name: x[part] for name, x in values.items()}, count)
        cache.mtp_end[slots] = positions + 1
        return drafted

    def _draft(self, values: dict[str, np.ndarray], count: int) -> Ints:
        size = len(values["slots"])
        batch = next(size_ for size_ in BATCHES if size_ >= size)
        if batch not in self.draft_inputs:
            shapes = {name: (batch, *x.shape[1:]) for name, x in values.items()} | {"counts": (batch,)}
            self.draft_inputs[batch] = Inputs(shapes, self.device)
        inputs = self.draft_inputs[batch]
        host = inputs.host()
        for name, x in (values | {"counts": np.ones(size)}).items():
            host[name][:size], host[name][size:] = x, 0
        inputs.send()
        is_drawn = bool((values["temperatures"] != 0).any())
        (drafts,) = self.graphs.run(
            ("draft", batch, count, is_drawn), lambda: (self._draft_pass(inputs.device, count, is_drawn),)
        )
        return drafts[:size].cpu().numpy().astype(np.int32)

    def _draft_pass(self, inputs: dict[str, Tensor], count: int, is_drawn: bool) -> Tensor:
        """(B, count) tokens, from tensors alone. Every layer builds keys and values of the last RECENT positions, as
        many as may have to be mended, whether they have or not: sizes stay the same."""
        known = list(inputs["recent"].clamp_min(0).unbind(1))  # from position p - 6 on
        behind = torch.arange(1 - RECENT, 1, device=self.device)
        positions = inputs["positions"][:, None] + behind  # (B, RECENT)
        hidden = self.hidden[inputs["slots"][:, None], positions % self.hidden.shape[1]]
        rope = rope_angles(self.model.config.attention(WINDOW), positions, hidden.dtype)
        for k in range(count):
            oldest = torch.maximum(inputs["firsts"], inputs["ends"] - k)
            is_absent = (positions < oldest[:, None]) | (inputs["counts"][:, None] == 0)
            tokens = torch.stack(known[k : k + RECENT], 1)
            out = self._mtp(k, hidden, tokens, rope, positions.masked_fill(is_absent, -1), inputs)
            known.append(self._favourite(out, k, inputs, is_drawn))
        return torch.stack(known[RECENT:], 1)

    def _mtp(
        self, k: int, hidden: Tensor, tokens: Tensor, rope: Rope, stored: Tensor, inputs: dict[str, Tensor]
    ) -> Tensor:
        """MTP layer k over hidden states (B, RECENT, H): keys and values at positions `stored`, the rest of the layer
        at the last position only -> (B, H)."""
        layer: Any = self.model.model.mtp.layers[k]
        attention, cached = layer.self_attn, self.cache.layers[layer.self_attn.layer]
        embedding = self.model.model.embed_tokens(tokens)
        x = layer.eh_proj(torch.cat([layer.enorm(embedding), layer.hnorm(hidden)], -1))
        normed = layer.input_layernorm(x)
        q, keys, values = _heads(attention, normed, queries=1)
        slots = inputs["slots"]
        rotate_and_store(None, keys, values, rope, stored, cached.k, cached.v, slots, attention.value_scale)
        out = paged_attention(
            rotate(q, (rope[0][:, -1:], rope[1][:, -1:])), cached.k, cached.v, slots, inputs["positions"],
            inputs["counts"], window=attention.shape.window, sink=attention.attention_sink_bias,
            firsts=inputs["firsts"],
        )
        y = x[:, -1:] + attention.o_proj(out.flatten(2))
        y = y + layer.mlp(layer.pre_mlp_layernorm(y))
        return layer.final_layernorm(y)[:, 0]

    def _favourite(self, hidden: Tensor, k: int, inputs: dict[str, Tensor], is_drawn: bool) -> Tensor:
        """As TorchRunner's `_pick`: the likeliest token, or the one that the noise of its position favours (B,)."""
        logits, ids = F.linear(hidden, self.draft_head).float(), self.draft_tokens
        if is_drawn:
            tokens = torch.arange(logits.shape[1], device=self.device) if ids is None else ids
            race = exponential_noise(inputs["seeds"], inputs["positions"] + 2 + k, tokens).log().float()
            temperature = inputs["temperatures"].view(torch.float64).float()[:, None]
            is_greedy = temperature == 0
            logits = logits.where(is_greedy, logits / temperature.masked_fill(is_greedy, 1) - race)
        best = logits.argmax(-1)
        return best if ids is None else ids[best]


def _heads(attention: Attention, x: Tensor, queries: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, L, H) -> q, k, v (B, L, heads, width), not rotated; q of the last `queries` places only, 0: of all."""
    shape = attention.shape
    q = attention.q_proj(x[:, -queries:]).unflatten(-1, (shape.heads, -1))
    k = attention.k_proj(x).unflatten(-1, (shape.kv_heads, -1))
    return q, k, attention.v_proj(x).unflatten(-1, (shape.kv_heads, -1))


def _experts(mlp: MoE, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, L, H) -> the mixture's output, and the experts chosen (B, L, K); places that are not real read none."""
    flat = x.flatten(0, 1)
    routing, weights = mlp.gate(flat)
    indices = routing.indices.masked_fill(~real.flatten()[:, None], mlp.gate.weight.shape[0])
    e = mlp.experts
    scales = e.scales if isinstance(e, FP8Experts) else None
    y = decode_experts(flat, e.gate_up_proj, e.down_proj, indices, weights, scales)
    return y.view(x.shape), routing.indices.view(*real.shape, -1)


def _part(step: Step, sequences: np.ndarray) -> tuple[Step, Ints]:
    """The step of these sequences only, and its tokens' rows in the whole."""
    firsts = np.cumsum(step.counts) - step.counts
    rows = np.concatenate([np.arange(firsts[s], firsts[s] + step.counts[s], dtype=np.int32) for s in sequences])
    place = np.full(len(step.tokens), -1, np.int32)
    place[rows] = np.arange(len(rows))
    wanted = place[step.logits_rows]
    ahead = None if step.lookahead is None else step.lookahead[sequences]
    part = Step(
        step.slots[sequences], step.starts[sequences], step.counts[sequences], step.tokens[rows], wanted[wanted >= 0],
        ahead,
    )
    return part, rows
