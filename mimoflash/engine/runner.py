"""One pass of the model over what the scheduler has chosen: what a pass is, and how PyTorch runs it on any device."""

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mimoflash.config import ModelConfig
from mimoflash.engine.cache import PAGE, HybridCache, LayerCache
from mimoflash.engine.sampling import exponential_noise
from mimoflash.model import Transformer
from mimoflash.model.moe import Router

RECENT = 8  # confirmed tokens that `draft` is given: as far back as MTP entries can be mended
NO_FILL = -2

Ints = NDArray[np.integer[Any]]


@dataclass
class Step:
    """One pass: sequence s runs counts[s] tokens from position starts[s] on; S sequences, T tokens, one sequence after
    the other. All arrays are int32.

    A start may lie before the end of the sequence's last pass: rejected drafts are run over. Start 0 begins a text.
    `logits_rows` (N,): tokens, in any order, whose logits are wanted. `lookahead` (S, drafts): the prompt's tokens
    after each sequence's last one here, -1 where unknown; where given, the MTP layers are filled at these positions as
    far as tokens are known; NO_FILL in the first place: not for this sequence (it decodes, or the window is far).
    """

    slots: Ints
    starts: Ints
    counts: Ints
    tokens: Ints
    logits_rows: Ints
    lookahead: Ints | None = None


def route_dtype(config: ModelConfig) -> type[np.integer[Any]]:
    """Of the experts' numbers in a runner's routes."""
    return np.uint8 if config.n_routed_experts <= 256 else np.int16


@dataclass
class DraftNoise:
    """What makes sampled drafts agree with sampling: its noise is a function of seed, position and token.

    temperature (S,) float32, 0 where greedy; seed (S,) uint64."""

    temperature: NDArray[np.float32]
    seed: NDArray[np.uint64]


class Runner(Protocol):
    """A row's result depends on its own sequence only: not on the others, nor on where a pass was cut."""

    cache: HybridCache

    def forward(self, step: Step) -> tuple[Tensor, Tensor]:
        """Logits (N, vocabulary) float32 where the model is, and routes (T, MoE layers, experts per token) uint8 (int16
        where there are more than 256 experts) on the CPU. Keys, values and the last 8 + drafts hidden states of each
        slot are kept."""

    def draft(self, slots: Ints, positions: Ints, recent: Ints, count: int, noise: DraftNoise) -> Ints:
        """(S, count) drafted tokens for positions p + 2, p + 3, ..., where p = positions[s] is the last one that the
        trunk has run. `recent` (S, 8): the confirmed tokens at p - 6 .. p + 1, -1 before the text's start."""

    def refresh(self) -> None:
        """The model's weights have changed in place."""


class TorchRunner:
    """Any device, by the model's own modules. Sequences with about the same number of new tokens run as one padded
    batch; keys and values are gathered from pages and rings.

    Only the ids in model.model.mtp.draft_tokens are drafted, where it names some. Where `dtype` is not the model's, the
    runner has a converted copy.
    """

    def __init__(self, model: Transformer, cache: HybridCache, *, dtype: torch.dtype | None = None):
        self.source, self.cache = model, cache
        self.device = model.lm_head.weight.device
        same = dtype == model.lm_head.weight.dtype
        self.model = model if dtype is None or same else _converted(model, dtype)
        self.route_dtype = torch.uint8 if route_dtype(model.config) is np.uint8 else torch.int16
        ids = model.model.mtp.draft_tokens
        self.draft_tokens = None if ids is None else ids.to(self.device)
        weight = self.model.lm_head.weight
        places = RECENT + cache.drafts if cache.drafts else 0
        self.hidden = torch.zeros(cache.slots, places, weight.shape[1], dtype=weight.dtype, device=self.device)

    def refresh(self) -> None:
        if self.model is not self.source:
            self.model.load_state_dict(self.source.state_dict())

    @torch.inference_mode()
    def forward(self, step: Step) -> tuple[Tensor, Tensor]:
        config = self.model.config
        firsts = np.cumsum(step.counts) - step.counts  # (S,) row of each sequence's first token
        hidden = self.hidden.new_empty(len(step.tokens), config.hidden_size)
        shape = len(step.tokens), len(config.moe_layers), config.num_experts_per_tok
        routes = torch.empty(shape, dtype=self.route_dtype)
        for group in _groups(step.counts):
            rows, real = _ragged(firsts[group], step.counts[group])  # (B, L)
            batch = _Batch(self.cache, step.slots[group], step.starts[group], step.counts[group], device=self.device)
            tokens = self._tensor(step.tokens[np.where(real, rows, 0)])
            out = self.model.trunk(tokens, batch.positions, cache=batch)
            there = torch.from_numpy(real)
            kept = torch.from_numpy(rows[real]).long()
            hidden[kept.to(self.device)] = out.hidden[there.to(self.device)]
            if config.moe_layers:
                routes[kept] = out.routes.to("cpu", routes.dtype)[there]
        if self.cache.drafts:
            if step.lookahead is not None:
                for s in np.nonzero(step.lookahead[:, 0] != NO_FILL)[0]:
                    chunk, ahead = slice(firsts[s], firsts[s] + step.counts[s]), step.lookahead[s]
                    known = np.concatenate([step.tokens[chunk], ahead[ahead >= 0]])
                    self._fill(int(step.slots[s]), int(step.starts[s]), hidden[chunk], known)
            self._keep_hidden(step, firsts, hidden)
        return self.model.logits(hidden[self._tensor(step.logits_rows)]).float(), routes

    @torch.inference_mode()
    def draft(self, slots: Ints, positions: Ints, recent: Ints, count: int, noise: DraftNoise) -> Ints:
        cache = self.cache
        # what was drafted too long ago to be mended counts as absent
        oldest = positions - (RECENT - cache.drafts)
        gap = cache.mtp_end[slots] < oldest
        cache.mtp_start[slots] = np.where(gap, oldest, cache.mtp_start[slots])
        ends = np.where(gap, oldest, np.minimum(cache.mtp_end[slots], positions))
        known = np.concatenate([recent, np.zeros((len(slots), count), np.int32)], 1)
        from_position = positions - (RECENT - 2)
        for k in range(cache.drafts):
            starts = np.maximum(cache.mtp_start[slots], ends - k)
            if k < count:
                hidden = self._run_mtp(k, slots, starts, positions + 1, known, from_position)
                known[:, RECENT + k] = self._pick(hidden, noise, positions + 2 + k)
                continue
            # a layer that does not draft now goes as far as its tokens are confirmed, so that it may later
            stops = positions + 1 - k
            (who,) = np.nonzero(starts < stops)
            if len(who):
                self._run_mtp(k, slots[who], starts[who], stops[who], known[who], from_position[who])
        cache.mtp_end[slots] = positions + 1
        return known[:, RECENT:]

    # -- MTP layers -----------------------------------------------------------------------------------------------

    def _keep_hidden(self, step: Step, firsts: Ints, hidden: Tensor) -> None:
        """The last hidden states of each sequence, position p at place p % (RECENT + drafts)."""
        places = self.hidden.shape[1]
        counts = np.minimum(step.counts, places)
        before = step.counts - counts
        rows, real = _ragged(firsts + before, counts)
        positions, _ = _ragged(step.starts + before, counts)
        slots = np.broadcast_to(step.slots[:, None], rows.shape)
        slot, place, row = (self._tensor(x[real]) for x in (slots, positions % places, rows))
        self.hidden[slot, place] = hidden[row]

    def _fill(self, slot: int, start: int, chunk: Tensor, tokens: Ints) -> None:
        """MTP entries over a prompt's chunk: `chunk` (L, H) hidden states from `start` on, `tokens` from there on too,
        as many as are known. Entries before the chunk that were built on drafts are built again."""
        cache, end, known_end = self.cache, start + len(chunk), start + len(tokens)
        # of a long chunk only the last window is read later
        oldest = end - self.model.config.sliding_window
        if cache.mtp_end[slot] != start or oldest > start:
            cache.mtp_start[slot] = max(start, oldest)
        for k in range(cache.drafts):
            first = max(int(cache.mtp_start[slot]), start - k)
            last = min(end, known_end - 1 - k)
            if first >= last:
                continue
            places = self._tensor(np.arange(first, start) % self.hidden.shape[1])
            hidden = torch.cat([self.hidden[slot, places], chunk[max(first - start, 0) : max(last - start, 0)]])
            one = [np.array([x], np.int32) for x in (slot, first, last - first, cache.mtp_start[slot])]
            batch = _Batch(cache, *one, device=self.device)
            ahead = self._tensor(tokens[first + 1 + k - start : last + 1 + k - start])
            self.model.mtp(k, hidden[None, : last - first], ahead[None], batch.positions, cache=batch)
        cache.mtp_end[slot] = max(int(cache.mtp_start[slot]), min(end, known_end - 1))

    def _run_mtp(self, k: int, slots: Ints, starts: Ints, stops: Ints, known: Ints, known_from: Ints) -> Tensor:
        """MTP layer k at positions starts .. stops - 1 of each slot -> its output at the last one (S, H)."""
        counts = stops - starts
        positions, real = _ragged(starts, counts)
        batch = _Batch(self.cache, slots, starts, counts, self.cache.mtp_start[slots], device=self.device)
        places = np.where(real, positions + 1 + k - known_from[:, None], 0)
        tokens = self._tensor(np.where(real, np.take_along_axis(known, places, 1), 0))
        hidden = self.hidden[self._tensor(slots)[:, None], self._tensor(positions % self.hidden.shape[1])]
        out = self.model.mtp(k, hidden, tokens, batch.positions, cache=batch)
        return out[torch.arange(len(slots), device=self.device), self._tensor(counts) - 1]

    def _pick(self, hidden: Tensor, noise: DraftNoise, positions: Ints) -> Ints:
        """The likeliest token of each row (S, H), or the one that the noise of `positions` favours."""
        weight, ids = self.model.lm_head.weight, self.draft_tokens
        logits = F.linear(hidden, weight if ids is None else weight[ids]).float()
        (drawn,) = np.nonzero(noise.temperature > 0)
        if len(drawn):
            tokens = torch.arange(len(weight), device=self.device) if ids is None else ids
            seeds = torch.from_numpy(noise.seed[drawn].view(np.int64)).to(self.device)
            race = exponential_noise(seeds, self._tensor(positions[drawn]), tokens)
            temperature = torch.from_numpy(noise.temperature[drawn]).to(self.device)
            drawn_rows = self._tensor(drawn)
            logits[drawn_rows] = logits[drawn_rows] / temperature[:, None] - race.log().float()
        best = logits.argmax(-1)
        return (best if ids is None else ids[best]).cpu().numpy().astype(np.int32)

    def _tensor(self, values: Ints) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).long().to(self.device)


@torch.no_grad()
def _converted(model: Transformer, dtype: torch.dtype) -> Transformer:
    """A copy in another dtype, where routers stay float32: a rounded score changes the choice."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if not isinstance(module, Router):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    return model


class _Batch:
    """A padded batch's view of the cache: what `model.attention.Cache` asks for. `firsts` (B,): positions before are
    absent (MTP layers)."""

    def __init__(
        self, cache: HybridCache, slots: Ints, starts: Ints, counts: Ints, firsts: Ints | None = None, *,
        device: torch.device,
    ):
        self.cache, self.slots, self.starts = cache, slots, starts
        self.firsts = np.zeros_like(starts) if firsts is None else firsts
        positions, real = _ragged(starts, counts)
        self.positions = torch.from_numpy(np.where(real, positions, -1)).long().to(device)
        self.length = torch.from_numpy(starts).to(device)
        self.ends = starts + counts

    def update(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `mimoflash.model.attention.Cache`."""
        cached = self.cache.layers[layer]
        if cached.window is None:
            self._write(cached, k, v, positions)
            return self._pages(cached, k.dtype)
        seen_k, seen_v, seen_positions = self._ring(cached, k.dtype)
        ring = cached.k.shape[2]
        oldest = torch.from_numpy(self.ends - ring).to(positions.device)
        self._write(cached, k, v, positions.where(positions >= oldest[:, None], -1))
        return torch.cat([seen_k, k], 1), torch.cat([seen_v, v], 1), torch.cat([seen_positions, positions], 1)

    def _write(self, cached: LayerCache, k: Tensor, v: Tensor, positions: Tensor) -> None:
        row, column = (positions >= 0).nonzero(as_tuple=True)
        kept, size = positions[row, column], cached.k.shape[2]
        slots = torch.from_numpy(self.slots).to(row.device).long()
        unit = slots[row]
        if cached.window is None:
            table = torch.from_numpy(self.cache.page_table[self.slots]).to(row.device).long()
            unit = table[row, kept // size]
        cached.k[unit, :, kept % size] = k[row, column].to(cached.k.dtype)
        cached.v[unit, :, kept % size] = v[row, column].to(cached.v.dtype)

    def _pages(self, cached: LayerCache, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """All positions so far, (B, pages * PAGE, Hkv, D)."""
        pages = -(-int(self.ends.max()) // PAGE)
        table = torch.from_numpy(self.cache.page_table[self.slots, :pages]).long().to(cached.k.device)
        places = torch.arange(pages * PAGE, device=cached.k.device).expand(len(self.slots), -1)
        ends = torch.from_numpy(self.ends).to(places.device)
        positions = places.where(places < ends[:, None], -1)
        k, v = (x[table].transpose(2, 3).flatten(1, 2) for x in (cached.k, cached.v))
        return _clean(k, positions, dtype), _clean(v, positions, dtype), positions

    def _ring(self, cached: LayerCache, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The positions before this pass, (B, ring, Hkv, D)."""
        ring = cached.k.shape[2]
        last = self.starts[:, None] - 1
        held = last - (last - np.arange(ring)) % ring  # the latest position that its place can hold
        held = np.where(held >= self.firsts[:, None], held, -1)
        positions = torch.from_numpy(held).long().to(cached.k.device)
        slots = torch.from_numpy(self.slots).long().to(cached.k.device)
        k, v = (x[slots].transpose(1, 2) for x in (cached.k, cached.v))
        return _clean(k, positions, dtype), _clean(v, positions, dtype), positions


def _clean(x: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros where there is no position: memory that was never written may hold NaN, which no mask hides."""
    return x.masked_fill((positions < 0)[:, :, None, None], 0).to(dtype)


def _ragged(starts: Ints, counts: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """(S, max count) starts[s] + 0, 1, ..., and which of them are within counts[s]."""
    places = np.arange(counts.max(), dtype=np.int32)
    return starts[:, None] + places, places < counts[:, None]


def _groups(counts: Ints) -> list[Ints]:
    """Sequences to run together: counts within a factor of two, so that at most half of a batch is padding."""
    sizes = np.ceil(np.log2(counts)).astype(int)
    return [np.nonzero(sizes == size)[0] for size in np.unique(sizes)]
