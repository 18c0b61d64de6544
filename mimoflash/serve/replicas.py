"""Several engines of each model, on Ray Serve, behind the one server. Ray is needed only here."""

import asyncio
import os
import random
import secrets
import signal
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from mimoflash.engine import Engine, Event, Output, SamplingParams
from mimoflash.text import Tokenizer

try:
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException
    from ray.serve.request_router import RequestRouter
except ImportError:
    raise ImportError("several replicas need Ray: pip install -e '.[ray]'") from None

_ANY_NUMBER = 1_000_000  # of requests: the server's gate says how many, not Ray's queues
_BLOCK = 32  # tokens
_KNOWN_BLOCKS = 100_000  # remembered: 3 million tokens of conversations
_WORTH = 1000  # known tokens make up for one request more that runs there


@contextmanager
def on_ray(open_engine: Callable[[str], Engine], replicas: int, models: int) -> Iterator[Callable[[str], Any]]:
    """Within, what is given opens `replicas` engines of the model at a place, each in a process of its own, and is used
    as one engine; `models` of them are in memory at a time. They run on the cluster at RAY_ADDRESS, else on one that is
    started here and ends with the block. With CUDA each has a GPU, else its share of the cores. Raises ValueError where
    there are too few GPUs, ConnectionError where there is no cluster."""
    address = os.environ.get("RAY_ADDRESS") or "local"
    here: dict[str, Any] = {}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to others
        here = {"num_cpus": max(os.cpu_count() or 1, replicas), "include_dashboard": False}
    ray.init(address, log_to_driver=False, configure_logging=False, **here)
    try:
        cores, cards = (int(ray.cluster_resources().get(kind, 0)) for kind in ("CPU", "GPU"))
        gpus = 1 if torch.version.cuda and cards else 0
        if gpus and cards < replicas * models:
            raise ValueError(
                f"{replicas} replicas of {models} models at a time need a GPU each, and Ray has {cards}: ask for fewer "
                "--replicas, or models at a time by --max-loaded"
            )
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
        deployment = serve.deployment(_Replica).options(
            num_replicas=replicas, ray_actor_options={"num_cpus": 1 / models, "num_gpus": gpus},
            max_ongoing_requests=_ANY_NUMBER, max_constructor_retry_count=1,
            graceful_shutdown_timeout_s=1, graceful_shutdown_wait_loop_s=0.1,  # the server has waited for what runs
            request_router_config={"request_router_class": ConversationRouter},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        bind = partial(deployment.bind, open_engine, threads=max(cores // replicas, 1))
        yield lambda place: Replicas(bind(place))
    except SystemExit as end:
        if end.code != signal.SIGTERM:
            raise
        ray.shutdown()  # takes away its handler, which has made an exit of the signal
        signal.raise_signal(signal.SIGTERM)
    finally:
        ray.shutdown()


class Replicas:
    """What the server asks of an engine, answered by several."""

    def __init__(self, deployment: Any):
        self._name = f"mimoflash-{secrets.token_hex(4)}"  # others may serve on the same cluster
        try:
            self._handle = serve.run(deployment, name=self._name, route_prefix=None)
            told = self._handle.broadcast("about").results()
        except BaseException as error:
            reason = _failure(self._name)
            self.close()  # it would outlive this process
            if isinstance(error, RuntimeError):
                raise ValueError(f"a replica did not start: {reason or error}") from None
            raise
        self._streams = self._handle.options(stream=True)
        self.tokenizer, config, _ = told[0]
        self.model = SimpleNamespace(config=config)
        self.runner = SimpleNamespace(cache=SimpleNamespace(positions=min(positions for _, _, positions in told)))

    async def events(
        self, prompt: Sequence[int], params: SamplingParams | None = None, *, gather: float = 0.0
    ) -> AsyncGenerator[Event, None]:
        response, event = self._streams.events.remote(list(prompt), params, gather), None
        try:
            async for event in response:
                yield event
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        finally:
            if not isinstance(event, Output):
                response.cancel()

    def stats(self) -> dict[str, Any]:
        """Of all replicas that answer: counts add up, means are taken of means."""
        try:
            told = self._handle.broadcast("stats").results(timeout_s=10, return_exceptions=True)
        except (RayServeException, TimeoutError):  # all of them are being replaced
            told = []
        return _summed([each for each in told if isinstance(each, dict)] or [{"cache_used_bytes": {}}])

    def close(self) -> None:
        serve.delete(self._name)


def _failure(name: str) -> str:
    """The last line of what Ray says about the replica that failed."""
    application = serve.status().applications.get(name)
    said = [each.message for each in application.deployments.values()] if application else []
    return said[0].strip().rpartition("\n")[-1] if said else ""


def _summed(each: Sequence[Any]) -> Any:
    first = each[0]
    if isinstance(first, dict):
        return {key: _summed([one[key] for one in each]) for key in first}
    if isinstance(first, list):
        return [_summed(values) for values in zip(*each, strict=True)]
    return sum(each) / len(each) if isinstance(first, float) else sum(each)


class _Replica:
    """Runs in a process of its own, many requests at a time."""

    def __init__(self, open_engine: Callable[[str], Engine], place: str, threads: int):
        torch.set_num_threads(threads)
        self._engine = open_engine(place)

    async def about(self) -> tuple[Tokenizer | None, Any, int]:
        return self._engine.tokenizer, self._engine.model.config, self._engine.runner.cache.positions

    async def stats(self) -> dict[str, Any]:
        return await asyncio.to_thread(self._engine.stats)  # which waits for the end of a pass

    async def events(self, prompt: list[int], params: SamplingParams | None, gather: float) -> Any:
        async with aclosing(self._engine.events(prompt, params, gather=gather)) as events:
            async for event in events:
                if isinstance(event, Output):
                    event.routes = torch.empty(0)  # much, and no client is told
                yield event


class ConversationRouter(RequestRouter):
    """A prompt goes to the replica that has had most of it and need not run it again, unless another one is so much
    less busy that it is worth it; a new one to the least busy."""

    queue_len_response_deadline_s = 2.0  # one that is busy is not gone
    max_queue_len_response_deadline_s = 10.0

    def __init__(self, *arguments: Any, **more: Any):
        super().__init__(*arguments, **more)
        self._homes: OrderedDict[int, Any] = OrderedDict()  # replicas' ids, by the hash of a prompt's first blocks
        self._running: dict[str, tuple[Any, Any]] = {}  # requests, and their replicas' ids

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        request_id = pending_request.metadata.internal_request_id
        self._running.pop(request_id, None)
        self._running = {id: each for id, each in self._running.items() if not each[0].cancelled()}
        busy = Counter(replica for _, replica in self._running.values())
        by_id = {each.replica_id: each for each in random.sample(candidate_replicas, len(candidate_replicas))}
        idlest = min(by_id, key=busy.__getitem__)

        marks = _marks(pending_request.args[0])
        known = next((n for n in range(len(marks), 0, -1) if self._homes.get(marks[n - 1]) in by_id), 0)
        home = self._homes[marks[known - 1]] if known else idlest
        is_worth_it = 2 * known >= len(marks) and busy[home] - busy[idlest] <= known * _BLOCK // _WORTH
        chosen = home if is_worth_it else idlest

        self._running[request_id] = (pending_request.future, chosen)
        for mark in marks:
            self._homes[mark] = chosen
            self._homes.move_to_end(mark)
        while len(self._homes) > _KNOWN_BLOCKS:
            self._homes.popitem(last=False)
        return [[by_id[chosen]], candidate_replicas]  # any, should it not answer

    def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:
        self._running.pop(internal_request_id, None)


def _marks(prompt: Sequence[int]) -> list[int]:
    """A hash for each number of first blocks."""
    marks, mark = [], 0
    for end in range(_BLOCK, len(prompt) + 1, _BLOCK):
        mark = hash((mark, *prompt[end - _BLOCK : end]))
        marks.append(mark)
    return marks
