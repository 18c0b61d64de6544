"""Shards: tokenised documents in one checksummed, memory-mapped file.

A shard holds the documents of one source and one split. All numbers are little-endian:

    header      magic, version, bytes a token (2 or 4), number of documents D, number of tokens N
    tokens      N x uint16 or uint32, the documents one after the other
    mask        N x uint8: 1 on what is always learned (plain text, what an assistant writes), 0 on prompts
    ends        D x uint64: where each document ends, in tokens
    identities  D x uint64: what the document is, for splits and leak checks (`dedup.identity_hash`)
    kinds       D x uint8: 1 a conversation, 0 plain text
    checksum    CRC-32 of all the above, as uint64
"""

import os
import shutil
import struct
import tempfile
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

MAGIC = b"MIMODATA"
VERSION = 1
_HEADER = struct.Struct("<8sIIQQ")
_CHECKSUM = struct.Struct("<Q")
_CHUNK = 1 << 22


class ShardWriter:
    """Writes documents one by one; `close` makes the file valid, and until then no reader accepts it."""

    def __init__(self, path: Path, vocab_size: int):
        self.path = path
        self.dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self.tokens = 0
        self._ends: list[int] = []
        self._identities: list[int] = []
        self._kinds = bytearray()
        self._file = open(path, "w+b")  # noqa: SIM115  closed by close()
        self._mask = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115  its place is known at the end
        self._file.write(bytes(_HEADER.size))

    def add(self, tokens: NDArray[np.integer], mask: NDArray[np.bool_], *, identity: int, conversation: bool) -> None:
        """Appends a document: `tokens` and `mask` of one length, `identity` an unsigned 64-bit hash."""
        assert len(tokens) == len(mask) > 0, "a document is a non-empty row of tokens with a mask of its length"
        self._file.write(tokens.astype(self.dtype).tobytes())
        self._mask.write(mask.astype(np.uint8).tobytes())
        self.tokens += len(tokens)
        self._ends.append(self.tokens)
        self._identities.append(identity)
        self._kinds.append(conversation)

    def __len__(self) -> int:
        return len(self._ends)

    def close(self) -> None:
        """Writes what follows the tokens, the header and the checksum, to the disk."""
        self._mask.seek(0)
        shutil.copyfileobj(self._mask, self._file, _CHUNK)
        self._mask.close()
        self._file.write(np.array(self._ends, "<u8").tobytes())
        self._file.write(np.array(self._identities, "<u8").tobytes())
        self._file.write(self._kinds)
        self._file.seek(0)
        self._file.write(_HEADER.pack(MAGIC, VERSION, self.dtype.itemsize, len(self), self.tokens))
        self._file.seek(0)
        checksum = 0
        while chunk := self._file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
        self._file.write(_CHECKSUM.pack(checksum))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ShardReader:
    """A shard opened for reading; `tokens` and `mask` stay on disk, the rest is a few bytes a document in memory.

    tokens (N,) uint16 or uint32, mask (N,) uint8, ends (D,) int64, identities (D,) uint64, conversation (D,) bool.
    Opening reads the whole file once to verify its checksum (about 1 GB/s).
    Raises ValueError if the file is not a shard, is of another version, is truncated or was altered.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if not self.path.is_file():
            raise self._broken("it is missing")
        size = self.path.stat().st_size
        if size < _HEADER.size + _CHECKSUM.size:
            raise self._broken(f"it has only {size} bytes")
        raw = np.memmap(self.path, np.uint8, mode="r")
        magic, version, token_bytes, documents, count = _HEADER.unpack(raw[: _HEADER.size].tobytes())
        if magic != MAGIC:
            raise self._broken("it is not a shard")
        if version != VERSION:
            raise self._broken(f"it has format version {version}, this program reads {VERSION}")
        expected = _HEADER.size + count * (token_bytes + 1) + documents * 17 + _CHECKSUM.size
        if token_bytes not in (2, 4) or size != expected:
            raise self._broken(f"it has {size} bytes where its header says {expected}")
        (checksum,) = _CHECKSUM.unpack(raw[-_CHECKSUM.size :].tobytes())
        if checksum != _crc32(raw[: -_CHECKSUM.size]):
            raise self._broken("its checksum does not match its contents")

        sections = np.cumsum([_HEADER.size, count * token_bytes, count, documents * 8, documents * 8, documents])
        tokens, mask, ends, identities, kinds = (raw[a:b] for a, b in pairwise(sections.tolist()))
        self.tokens = tokens.view(f"<u{token_bytes}")
        self.mask = mask
        self.ends = np.frombuffer(ends.tobytes(), "<u8").astype(np.int64)
        self.identities = np.frombuffer(identities.tobytes(), "<u8").astype(np.uint64)
        self.conversation = np.array(kinds, dtype=bool)

    def __len__(self) -> int:
        return len(self.ends)

    def document(self, index: int) -> tuple[NDArray[np.integer], NDArray[np.bool_]]:
        """Tokens and mask of one document."""
        start = self.ends[index - 1] if index else 0
        end = self.ends[index]
        return np.array(self.tokens[start:end]), np.array(self.mask[start:end], dtype=bool)

    def _broken(self, why: str) -> ValueError:
        return ValueError(f"{self.path}: {why}; delete the file's folder and prepare the data again")


def _crc32(raw: NDArray[np.uint8]) -> int:
    checksum = 0
    for start in range(0, len(raw), _CHUNK):
        checksum = zlib.crc32(raw[start : start + _CHUNK].data, checksum)
    return checksum
