"""The models of a server: each is loaded when it is first asked for."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mimoflash.engine import Engine
from mimoflash.serve.errors import ApiError
from mimoflash.text import Tokenizer


@dataclass(eq=False)
class Served:
    """A model that is loaded, by the name that clients call it."""

    name: str
    engine: Engine
    created: int = field(default_factory=lambda: int(time.time()))
    users: int = 0  # requests that run
    used: float = field(default_factory=time.monotonic)

    @property
    def tokenizer(self) -> Tokenizer:
        assert self.engine.tokenizer is not None, "a served model has a tokenizer"
        return self.engine.tokenizer

    @property
    def most_tokens(self) -> int:
        """Of a prompt and its answer: the model's context, or what the cache holds."""
        return min(self.context_length, self.engine.runner.cache.positions)

    @property
    def context_length(self) -> int:
        return self.engine.model.config.max_position_embeddings


class Registry:
    """`places` says where the model of each name is; `open_engine` loads one of them. No more than `most_loaded` are in
    memory: the one that has not been used for the longest goes, once nothing runs on it."""

    def __init__(self, places: Mapping[str, str], open_engine: Callable[[str], Engine], most_loaded: int = 2):
        self.places, self._open, self._most = dict(places), open_engine, most_loaded
        self.loaded: dict[str, Served] = {}
        self._lock = asyncio.Lock()
        self.started = int(time.time())

    @asynccontextmanager
    async def using(self, name: str) -> AsyncIterator[Served]:
        """The model stays loaded within. Raises ApiError for a name that is not served, and where loading fails."""
        served = await self._get(self.resolve(name))
        served.users += 1
        try:
            yield served
        finally:
            served.users -= 1

    async def _get(self, name: str) -> Served:
        if name not in self.loaded:
            async with self._lock:  # one at a time: two would want the memory of both
                if name not in self.loaded:
                    await self._make_room()
                    try:
                        await asyncio.to_thread(self.load, name)
                    except (ValueError, OSError, ImportError) as error:
                        reason = f"the model {name} cannot be loaded: {error}"
                        raise ApiError(500, reason, param="model") from error
        served = self.loaded[name]
        served.used = time.monotonic()
        return served

    def resolve(self, name: str) -> str:
        if name in self.places:
            return name
        known = ", ".join(self.places)
        raise ApiError(404, f"there is no model {name!r} here; this server has {known}", param="model",
                       code="model_not_found")

    def load(self, name: str) -> None:
        """Raises what `open_engine` raises, ValueError for a model without a tokenizer."""
        engine = self._open(self.places[name])
        if engine.tokenizer is None:
            raise ValueError(f"{self.places[name]} has no tokenizer")
        self.loaded[name] = Served(name, engine)

    async def _make_room(self) -> None:
        idle = sorted((each for each in self.loaded.values() if not each.users), key=lambda each: each.used)
        for served in idle[: max(0, len(self.loaded) - self._most + 1)]:
            del self.loaded[served.name]
            await asyncio.to_thread(served.engine.close)

    async def close(self) -> None:
        for served in self.loaded.values():
            await asyncio.to_thread(served.engine.close)
        self.loaded.clear()


def named(models: list[str]) -> dict[str, str]:
    """Places by the names that clients use: NAME=MODEL says one; a path is called by its last part. Raises ValueError
    where two get the same."""
    places: dict[str, str] = {}
    for given in models:
        name, equals, place = given.partition("=")
        if not equals:
            path = Path(given)
            name, place = (path.resolve().name.removesuffix(".gguf") if path.exists() else given), given
        if not name or not place:
            raise ValueError(f"{given!r}: give a model, or NAME=MODEL")
        if name in places:
            raise ValueError(f"two models are called {name}: give one another name, as other={place}")
        places[name] = place
    return places
