"""Duplicates: exact ones by a hash of the text, near ones by MinHash and locality-sensitive hashing.

Two documents are near-duplicates when the Jaccard similarity of their sets of word shingles (runs of five words) is
at least a threshold. A MinHash signature estimates it (Broder 1997): under a random permutation of all shingles, two
sets have the same minimum with a probability equal to their similarity. Only documents that agree on a whole band of
the signature are compared, so that looking a document up costs the same however many there are.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

SHINGLE_WORDS = 5
PERMUTATIONS = 120

_ODD = np.uint64(0x9E3779B97F4A7C15)  # any odd number has an inverse modulo 2^64
_ODD_INVERSE = np.uint64(pow(int(_ODD), -1, 1 << 64))
_random = np.random.default_rng(0)
_FACTORS = _random.integers(0, 1 << 32, (PERMUTATIONS, 1), dtype=np.uint32) | np.uint32(1)
_OFFSETS = _random.integers(0, 1 << 32, (PERMUTATIONS, 1), dtype=np.uint32)


def identity_hash(text: str) -> int:
    """An unsigned 64-bit hash of a text, the same for texts that differ in white space only."""
    normalised = " ".join(text.split())
    return int.from_bytes(
        hashlib.blake2b(normalised.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
    )


def shingles(text: str) -> NDArray[np.uint32]:
    """Hashes of all runs of five words (one hash of all words if there are fewer; none if there are no words).

    A word is what stands between ASCII white space. All words are hashed at once: with prefix sums of byte x
    ODD^place, the hash of the bytes a..b is (prefix[b] - prefix[a]) x ODD^-a, modulo 2^64.
    """
    raw = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
    edges = np.flatnonzero(np.diff(raw > ord(" "), prepend=False, append=False))
    starts, ends = edges[::2], edges[1::2]
    if len(starts) == 0:
        return np.zeros(0, np.uint32)
    prefix = np.zeros(len(raw) + 1, np.uint64)
    np.cumsum(raw * _powers(_ODD, len(raw)), out=prefix[1:])
    words = _mix((prefix[ends] - prefix[starts]) * _powers(_ODD_INVERSE, len(raw))[starts])

    width = min(SHINGLE_WORDS, len(words))
    runs = np.lib.stride_tricks.sliding_window_view(words, width)
    return (_mix((runs * _powers(_ODD, width)).sum(1, dtype=np.uint64)) >> np.uint64(32)).astype(np.uint32)


def minhash(hashes: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The signature of a set of shingles: PERMUTATIONS minima, each under its own permutation x -> a x + b mod 2^32."""
    signature = np.full(PERMUTATIONS, 0xFFFFFFFF, np.uint32)
    for start in range(0, len(hashes), 1024):  # 1,024 x 120 x 4 bytes stay in cache
        permuted = hashes[start : start + 1024] * _FACTORS
        permuted += _OFFSETS
        np.minimum(signature, permuted.min(1), out=signature)
    return signature


class NearDuplicates:
    """The signatures of the documents kept so far; about 4 kB a document in memory, so some million documents a
    machine.
    """

    def __init__(self, threshold: float = 0.8):
        if not 0.3 <= threshold <= 1:
            raise ValueError(f"the near-duplicate threshold is a similarity between 0.3 and 1, not {threshold}")
        self.threshold = threshold
        self.rows = _band_rows(threshold)
        self._buckets: dict[int, list[int]] = {}
        self._signatures: list[NDArray[np.uint32]] = []

    def find_or_add(self, signature: NDArray[np.uint32]) -> int | None:
        """The number of a kept document that this one repeats, else None: it is then kept (numbers count from 0)."""
        keys = self._band_keys(signature)
        candidates = sorted({document for key in keys for document in self._buckets.get(key, ())})
        for document in candidates:
            if np.mean(self._signatures[document] == signature) >= self.threshold:
                return document
        for key in keys:
            self._buckets.setdefault(key, []).append(len(self._signatures))
        self._signatures.append(signature)
        return None

    def _band_keys(self, signature: NDArray[np.uint32]) -> list[int]:
        bands = signature[: PERMUTATIONS // self.rows * self.rows].reshape(-1, self.rows).astype(np.uint64)
        keys = (_mix(bands) * _powers(_ODD, self.rows)).sum(1, dtype=np.uint64)
        return _mix(keys + np.arange(len(keys), dtype=np.uint64)).tolist()


def _band_rows(threshold: float) -> int:
    """Rows a band: as many as leave a pair at the threshold a 99 % chance to agree on one band, 1 - (1 -
    t^rows)^bands.
    """
    return max(rows for rows in range(1, 31) if 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) >= 0.99)


def _powers(base: np.uint64, count: int) -> NDArray[np.uint64]:
    """base^0 .. base^(count-1) modulo 2^64."""
    powers = np.full(count, base, np.uint64)
    powers[:1] = 1
    return np.cumprod(powers, dtype=np.uint64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """MurmurHash3's finaliser: every bit of the input reaches every bit of the output."""
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))
