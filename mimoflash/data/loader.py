"""The loader: a weighted mixture of shards as batches of packed rows, a pure function of the sample's number.

Sample i is row k of one source: `Mixture` says which, and `Packing` what stands in it. Nothing is remembered between
calls, so a run resumes at the exact sample, a rank asks for its own part of a batch, and the batch size may change at
any step.
"""

import threading
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mimoflash.data.packing import Epoch, Packing, ranges
from mimoflash.data.shards import ShardReader

CYCLE = 1 << 16


@dataclass(frozen=True)
class Batch:
    """B rows of L tokens.

    tokens (B, L) int64, 0 where padded; document_ids (B, L) int64, from 0 in each row, -1 where padded; positions (B,
    L) int64, from 0 in each document (and in each piece of one that was cut), 0 where padded; loss_weight (B, L)
    float32: of the token itself as a target. 0 on padding and on the first token of a piece, before which there is
    nothing to predict it from. A head that looks k tokens ahead still has to compare document_ids.
    """

    tokens: Tensor
    document_ids: Tensor
    positions: Tensor
    loss_weight: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(*(tensor.to(device) for tensor in vars(self).values()))

    def rows(self, start: int, end: int) -> "Batch":
        return Batch(*(tensor[start:end] for tensor in vars(self).values()))


class Mixture:
    """Which source sample i comes from, and the how-manieth of that source it is.

    Weights are shares of the samples, that is of rows. They are rounded to 1/65,536 (at least that much for every
    source) and then exact in every cycle of 65,536 samples; within it a source's samples are spread evenly, each at a
    random place in its own stretch. Raises ValueError if there are no weights or one is not positive.
    """

    def __init__(self, weights: Mapping[str, float], seed: int):
        if not weights:
            raise ValueError("a mixture needs at least one source with a weight")
        for name, weight in weights.items():
            if not 0 < weight < np.inf:
                raise ValueError(
                    f"source {name!r} has weight {weight} in the mixture: give a positive number or leave it out"
                )
        shares = np.array(list(weights.values()), float)
        shares *= CYCLE / shares.sum()
        counts = np.maximum(1, np.floor(shares)).astype(np.int64)
        while (missing := CYCLE - counts.sum()) != 0:  # hand out what rounding left over, to the most wronged first
            change = int(np.sign(missing))
            eligible = np.where(counts + change > 0, change * (shares - counts), -np.inf)
            counts[np.argmax(eligible)] += change
        random = np.random.default_rng((seed, 1))
        rank = ranges(np.zeros_like(counts), counts)
        source = np.repeat(np.arange(len(counts)), counts)
        order = np.argsort((rank + random.random(CYCLE)) / counts[source], kind="stable")
        self.counts, self._source, self._rank = counts, source[order], rank[order]

    def __call__(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(index of the source, number of the sample within the source), for each sample's number."""
        cycle, place = np.divmod(samples, CYCLE)
        source = self._source[place]
        return source, cycle * self.counts[source] + self._rank[place]


class PackedLoader:
    """Batches of packed rows from a weighted mixture of shards.

    `shards` by source name; `weights` by source name, of those that take part; `prompt_weight` is the loss weight of
    what an assistant does not write in a conversation (0 for fine-tuning, e.g. 0.2 in pre-training); all else weighs
    1. `packing[name]` tells rows, padding and truncated conversations of each source. Raises ValueError for a weight
    without a shard, a shard without documents, or weights that are not positive.
    """

    def __init__(
        self,
        shards: Mapping[str, ShardReader],
        weights: Mapping[str, float],
        sequence_length: int,
        *,
        seed: int = 0,
        prompt_weight: float = 0.0,
    ):
        if unknown := sorted(set(weights) - set(shards)):
            raise ValueError(f"the mixture names {unknown}, but the prepared sources are {sorted(shards)}")
        if sequence_length < 2:
            raise ValueError(f"sequence_length is {sequence_length}: a row needs two tokens, one to predict the other")
        self.sequence_length = sequence_length
        self.packing = {name: Packing(shards[name], sequence_length) for name in weights}
        self._shards = [shards[name] for name in weights]
        self._names = list(weights)
        self._mixture = Mixture(weights, seed)
        self._weight_of_mask = np.array([prompt_weight, 1.0], np.float32)
        self._seed = seed
        self._epochs: dict[
            tuple[str, int], Epoch
        ] = {}  # the last two of each source: a batch may cross from one to the next
        self._lock = threading.Lock()

    def batch(self, first_sample: int, count: int) -> Batch:
        """Samples first_sample .. first_sample + count: a function of its arguments alone, safe to call from several
        threads.
        """
        if first_sample < 0 or count < 1:
            raise ValueError(f"a batch is at least one sample from 0 on, not {count} from {first_sample} on")
        shape = (count, self.sequence_length)
        tokens, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        document_ids, loss_weight = np.full(shape, -1, np.int64), np.zeros(shape, np.float32)

        source_B, number_B = self._mixture(np.arange(first_sample, first_sample + count))
        rows_B = np.array([packing.rows for packing in self.packing.values()])[source_B]
        epoch_B, row_B = np.divmod(number_B, rows_B)
        for source, epoch in np.unique(np.stack([source_B, epoch_B], 1), axis=0).tolist():
            chosen = np.flatnonzero((source_B == source) & (epoch_B == epoch))
            order = self._epoch(self._names[source], epoch)
            first, last = order.first[row_B[chosen]], order.first[row_B[chosen] + 1]

            piece = ranges(first, last - first)  # P pieces, row after row
            length_P = order.length[piece]
            row_P = np.repeat(chosen, last - first)
            number_P = piece - np.repeat(first, last - first)
            begin_P = np.cumsum(length_P) - length_P
            column_P = begin_P - np.repeat(begin_P[number_P == 0], last - first)

            position = ranges(np.zeros_like(length_P), length_P)  # and T tokens
            at = np.repeat(row_P * self.sequence_length + column_P, length_P) + position
            taken = np.repeat(order.start[piece], length_P) + position
            shard = self._shards[source]
            tokens.flat[at] = shard.tokens[taken]
            positions.flat[at] = position
            document_ids.flat[at] = np.repeat(number_P, length_P)
            loss_weight.flat[at] = self._weight_of_mask[shard.mask[taken]] * (position > 0)
        return Batch(*(torch.from_numpy(array) for array in (tokens, document_ids, positions, loss_weight)))

    def batches(self, first_sample: int, counts: Iterable[int], *, workers: int = 2, ahead: int = 4) -> Iterator[Batch]:
        """The batches of `counts` samples each, from first_sample on, `ahead` of them made by `workers` threads in
        advance.

        Threads suffice: a batch is some twenty numpy calls, and those which take time (gathers, page faults of the
        memory map) let go of the interpreter's lock; processes would copy every batch once more.
        """
        with ThreadPoolExecutor(workers, thread_name_prefix="loader") as pool:
            waiting: deque[Future[Batch]] = deque()
            try:
                for count in counts:
                    waiting.append(pool.submit(self.batch, first_sample, count))
                    first_sample += count
                    if len(waiting) > ahead:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _epoch(self, name: str, number: int) -> Epoch:
        with self._lock:
            if (name, number) not in self._epochs:
                held = sorted(epoch for source, epoch in self._epochs if source == name)
                if len(held) == 2:
                    del self._epochs[name, held[0]]
                self._epochs[name, number] = self.packing[name].epoch((self._seed, zlib.crc32(name.encode()), number))
            return self._epochs[name, number]
