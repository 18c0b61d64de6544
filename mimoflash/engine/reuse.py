"""What is kept of finished requests: conversations for their next turn, and (an option) prefixes for everyone."""

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mimoflash.engine.cache import HybridCache, RingSnapshot
from mimoflash.engine.request import Request, Routes

BLOCK = 256  # positions: prefixes are shared in multiples of it; a whole number of pages


class Conversations:
    """Finished requests that still have their slots, the longest unused first.

    A new prompt goes on from one of them only if it repeats that prompt and some of what was generated: so it is the
    same conversation, and nothing passes between others (a rollout's routes stay those that were sampled).
    """

    def __init__(self, cache: HybridCache):
        self.cache = cache
        self.kept: OrderedDict[Request, None] = OrderedDict()

    def keep(self, request: Request) -> None:
        self.kept[request] = None

    def find(self, request: Request) -> tuple[Request | None, int]:
        """The conversation that spares most of the request's text, and how many of its positions."""
        if request.is_unscored:
            return None, 0
        found = [(earlier, length) for earlier in self.kept if (length := self._usable(earlier, request.text))]
        return max(found, key=lambda each: each[1], default=(None, 0))

    def _usable(self, request: Request, prompt: Sequence[int]) -> int:
        n, text = request.prompt_tokens, request.text
        if len(prompt) <= n or len(text) <= n or prompt[n] != text[n] or prompt[:n] != text[:n]:
            return 0
        common = _common_length(prompt, text)
        if common >= request.run < len(prompt):
            return request.run
        if not self.cache.has_rings:
            return min(common, len(prompt) - 1)
        return n if request.snapshot is not None else 0  # rings hold the end only, and the prompt's

    def resume(self, request: Request, length: int) -> int:
        """The conversation's slot, which belongs to another request from now on and goes on at `length`."""
        slot, request.slot = request.slot, -1
        if length < request.run:
            if self.cache.has_rings:
                assert request.snapshot is not None, "found by its snapshot"
                self.cache.restore(slot, request.snapshot)
            else:
                self.cache.rewind(slot, length)
        request.snapshot = None
        return slot

    def drop(self) -> bool:
        """Gives back the memory of the one unused for longest; False if there is none."""
        if not self.kept:
            return False
        request, _ = self.kept.popitem(last=False)
        self.cache.free_slot(request.slot)
        request.slot, request.snapshot = -1, None
        return True

    def forget(self) -> None:
        """All of them, where the cache is cleared."""
        for request in self.kept:
            request.slot, request.snapshot = -1, None
        self.kept.clear()


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@dataclass
class Prefix:
    """The last BLOCK positions of a prefix: their pages and routes, and the rings at its end."""

    pages: list[int]
    rings: RingSnapshot
    routes: Routes


class SharedPrefixes:
    """Prompts' beginnings by a hash of their tokens, block after block, the longest unused first: as many as there is
    memory for, of pages and of copies of rings."""

    def __init__(self, cache: HybridCache):
        self.cache = cache
        self.most = cache.copies if cache.has_rings else cache.pages
        self.kept: OrderedDict[bytes, Prefix] = OrderedDict()

    def find(self, request: Request) -> list[Prefix]:
        """The blocks that the request's prompt begins with; one token at least is left to run."""
        if not request.keys:
            request.keys = list(_keys(request.text[: request.prompt_tokens]))
        if request.is_unscored:  # others may go on from its blocks
            return []
        keys = request.keys[: (len(request.text) - 1) // BLOCK]
        keys = list(itertools.takewhile(self.kept.__contains__, keys))
        self._touch(keys)
        return [self.kept[key] for key in keys]

    def add(self, request: Request) -> None:
        """Keeps the request's last block, if its prompt has just been run to the end of one."""
        blocks, rest = divmod(request.run, BLOCK)
        if rest or not 0 < blocks <= len(request.keys):
            return
        *before, last = request.keys[:blocks]
        self._touch([key for key in (*before, last) if key in self.kept])
        if last not in self.kept and all(key in self.kept for key in before) and len(before) < self.most:
            if len(self.kept) == self.most:
                self.drop()  # none of those before, which have just been touched
            start, end = request.run - BLOCK, request.run
            pages = self.cache.full_pages(request.slot, start, end)
            self.cache.retain(pages)
            rings = self.cache.snapshot(request.slot, end)
            self.kept[last] = Prefix(pages, rings, request.routes[start:end].copy())
            self._touch([*before, last])

    def _touch(self, keys: list[bytes]) -> None:
        for key in reversed(keys):  # a prefix is dropped after all that go on from it
            self.kept.move_to_end(key)

    def drop(self) -> bool:
        """Gives up the block unused for longest; False if there is none."""
        if not self.kept:
            return False
        _, prefix = self.kept.popitem(last=False)
        self.cache.release(prefix.pages)
        return True


def _keys(tokens: Sequence[int]) -> Iterator[bytes]:
    """A hash of each whole number of blocks."""
    digest = hashlib.blake2b(digest_size=16)
    for end in range(BLOCK, len(tokens) + 1, BLOCK):
        digest.update(np.array(tokens[end - BLOCK : end], np.int32).tobytes())
        yield digest.digest()
