"""Encoding: documents to token ids with a mask, an identity and what tells duplicates, in one process or several."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimoflash.data.dedup import identity_hash, minhash, shingles
from mimoflash.data.sources import Document, DomainSource, Source, domain_documents, read_documents
from mimoflash.text import Tokenizer, encode_training_chat, load_tokenizer
from mimoflash.world import is_held_out

_JOB = 256  # documents that a process takes at a time
_JOBS_UNDER_WAY = 64
_Job = tuple[Source, list[Document] | range]  # documents, or the seeds of a domain's


@dataclass(frozen=True)
class Encoded:
    """A document as it goes into a shard, its split, and what tells whether an earlier one is the same."""

    tokens: NDArray[np.uint32]
    mask: NDArray[np.bool_]
    identity: int
    conversation: bool
    held_out: bool
    duplicate_key: tuple[str, int]
    signature: NDArray[np.uint32] | None  # None: near-duplicates are welcome


class Encoder:
    """Encodes jobs in any process: what is sent there is the tokenizer's folder, and it is loaded on first use."""

    def __init__(self, tokenizer_folder: Path, held_out: float):
        self._folder, self._held_out = tokenizer_folder, held_out
        self._tokenizer: Tokenizer | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokenizer": None}

    def __call__(self, job: _Job) -> list[Encoded]:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._folder)
        source, work = job
        if isinstance(work, range):
            assert isinstance(source, DomainSource)
            work = list(domain_documents(source, work))
        return [self._encode(self._tokenizer, document, source) for document in work]

    def _encode(self, tokenizer: Tokenizer, document: Document, source: Source) -> Encoded:
        identity = document.identity
        if document.messages is None:
            ids = tokenizer.encode(document.text) if document.text and not document.text.isspace() else []
            if ids and document.complete and tokenizer.special.end_of_text is not None:
                ids.append(tokenizer.special.end_of_text)
            mask = [True] * len(ids)
        else:
            try:
                # who could have thought writes that it has not; where thinking is off, that stands in the prompt
                thinks = any("reasoning_content" in message for message in document.messages)
                ids, mask = encode_training_chat(
                    tokenizer, document.messages, document.tools, enable_thinking=thinks
                )
            except ValueError as error:
                raise ValueError(f"{document.where}: {error}") from None
        if isinstance(source, DomainSource):
            key, signature = (source.name, identity), None
        else:
            content = document.content
            key, signature = ("", identity_hash(content)), minhash(shingles(content))
        held_out = is_held_out_document(document, source, self._held_out)
        chat = document.messages is not None
        return Encoded(np.array(ids, np.uint32), np.array(mask, bool), identity, chat, held_out, key, signature)


def is_held_out_document(document: Document, source: Source, fraction: float) -> bool:
    """Whether training must not see it: the world's own tenth of a domain's tasks, by hash this `fraction` of the
    rest."""
    if isinstance(source, DomainSource):
        return is_held_out(document.messages or [])
    return document.identity < fraction * 2**64


@contextmanager
def worker_pool(encoder: Encoder, workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """Processes that hold the encoder, started afresh; None where one worker is asked for: this process does it."""
    if workers <= 1:
        yield None
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker, initargs=(encoder,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def encode_source(source: Source, encoder: Encoder, pool: ProcessPoolExecutor | None) -> Iterator[Encoded]:
    """The encoded documents of a source in order, whoever makes them; no more than a few jobs wait for the pool."""
    waiting: deque[Future[list[Encoded]]] = deque()
    for job in _jobs(source):
        if pool is None:
            yield from encoder(job)
            continue
        waiting.append(pool.submit(_work, job))
        if len(waiting) > _JOBS_UNDER_WAY:
            yield from waiting.popleft().result()
    for future in waiting:
        yield from future.result()


def _jobs(source: Source) -> Iterator[_Job]:
    if isinstance(source, DomainSource):
        for start in range(0, source.count, _JOB):
            yield source, range(start, min(start + _JOB, source.count))
    else:
        documents = read_documents(source)
        while some := list(islice(documents, _JOB)):
            yield source, some


def _start_worker(encoder: Encoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder


def _work(job: _Job) -> list[Encoded]:
    return _worker_encoder(job)


_worker_encoder: Encoder
