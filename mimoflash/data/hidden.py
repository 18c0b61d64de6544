"""Rows of tokens with the hidden states that a trunk had at them, which stand on disk beside the tokens' shards."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mimoflash.data.loader import Batch
from mimoflash.data.shards import ShardReader


@dataclass(frozen=True)
class HiddenBatch:
    """B rows of L tokens, and the trunk's hidden states at them (B, L, H) float32, before its final norm."""

    batch: Batch
    hidden: Tensor

    def to(self, device: torch.device | str) -> "HiddenBatch":
        return HiddenBatch(self.batch.to(device), self.hidden.to(device))


class HiddenRows:
    """Cuts shards into rows of `sequence_length` tokens, documents one after the other: a pure function of a sample's
    number. Each epoch cuts at other places and takes the rows in another order.

    `hidden[i]` (N, H) belongs to the N tokens of `shards[i]`. `prompt_weight` is the loss weight of what the assistant
    did not write. A row's first document may have begun before it: positions count from the row's start, which
    attention within a window does not notice but at the row's first places. Raises ValueError where no shard has a row.
    """

    def __init__(
        self, shards: Sequence[ShardReader], hidden: Sequence[NDArray[np.float16]], sequence_length: int, *,
        seed: int = 0, prompt_weight: float = 0.0,
    ):
        assert [len(h) for h in hidden] == [s.tokens.size for s in shards], "a hidden state for each token"
        self.sequence_length, self.seed = sequence_length, seed
        self.shards, self.hidden = list(shards), list(hidden)
        self._weight_of_mask = np.array([prompt_weight, 1.0], np.float32)
        self._document = [np.repeat(np.arange(len(s)), np.diff(s.ends, prepend=0)) for s in shards]
        rows_S = np.array([(s.tokens.size - sequence_length + 1) // sequence_length for s in shards]).clip(min=0)
        self._shard = np.repeat(np.arange(len(shards)), rows_S)
        self._row = np.concatenate([np.arange(rows) for rows in rows_S])
        if not len(self._row):
            raise ValueError(f"the shards are shorter than two rows of {sequence_length} tokens: generate more")

    @property
    def rows(self) -> int:
        """Rows an epoch."""
        return len(self._row)

    def batch(self, first_sample: int, count: int) -> HiddenBatch:
        """Samples first_sample .. first_sample + count."""
        epochs_B, places_B = np.divmod(np.arange(first_sample, first_sample + count), self.rows)
        pieces = [self._piece(epoch, place) for epoch, place in zip(epochs_B.tolist(), places_B.tolist(), strict=True)]
        tokens, documents, weights, hidden = (torch.from_numpy(np.stack(x)) for x in zip(*pieces, strict=True))
        positions = torch.arange(self.sequence_length).expand(count, -1)
        return HiddenBatch(Batch(tokens, documents, positions, weights), hidden)

    def _piece(self, epoch: int, place: int) -> tuple[NDArray[np.generic], ...]:
        random = np.random.default_rng((self.seed, epoch))
        offset = int(random.integers(self.sequence_length))
        row = random.permutation(self.rows)[place]
        shard = self._shard[row]
        start = self._row[row] * self.sequence_length + offset
        cut = slice(start, start + self.sequence_length)
        document = self._document[shard][cut]
        weight = self._weight_of_mask[self.shards[shard].mask[cut]]
        weight[0] = 0.0  # nothing of the row comes before it
        tokens = self.shards[shard].tokens[cut].astype(np.int64)
        return tokens, document - document[0], weight, self.hidden[shard][cut].astype(np.float32)
