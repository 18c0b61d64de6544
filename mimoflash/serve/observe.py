"""What a server tells of itself: metrics for Prometheus, a line of log for each request, traces where they are asked
for. Nobody's text is in any of them."""

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from opentelemetry import trace
from opentelemetry.trace import Span
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from mimoflash.serve.gate import Gate
from mimoflash.serve.registry import Registry

log = logging.getLogger("mimoflash.serve")
_SPAN_NAMES = {"prompt_tokens": "gen_ai.usage.input_tokens", "completion_tokens": "gen_ai.usage.output_tokens"}
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


@dataclass
class Facts:
    """Of the request that is being answered, for its line of log and the metrics."""

    id: str
    begin: float = field(default_factory=time.monotonic)
    known: dict[str, Any] = field(default_factory=dict)
    span: Span = field(default_factory=trace.get_current_span)


facts: ContextVar[Facts | None] = ContextVar("facts", default=None)


def note(**known: Any) -> None:
    """Something to be told of the current request; tokens of several answers add up."""
    here = facts.get()
    if here is None:
        return
    for name, value in known.items():
        here.known[name] = here.known.get(name, 0) + value if name.endswith("_tokens") else value
        here.span.set_attribute(_SPAN_NAMES.get(name, f"mimoflash.{name}"), here.known[name])


def failed(error: BaseException) -> None:
    """An error that is the server's own fault."""
    here = facts.get()
    log.error("request %s failed", here.id if here else "?", exc_info=error)


class JsonLines(logging.Formatter):
    """Each record an object of one line."""

    def format(self, record: logging.LogRecord) -> str:
        told: Mapping[str, Any] = getattr(record, "told", {})
        line = {"time": self.formatTime(record), "level": record.levelname.lower(), "message": record.getMessage()}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line | dict(told), ensure_ascii=False, default=str)


class Metrics:
    """A registry of its own, so that several servers may live in one process."""

    def __init__(self, gate: Gate, models: Registry):
        self.registry = CollectorRegistry()
        self.registry.register(_Now(gate, models))
        own: Any = {"registry": self.registry, "namespace": "mimoflash"}
        self.requests = Counter("requests", "Requests answered", ["path", "status"], **own)
        self.tokens = Counter("tokens", "Tokens of prompts, of these cached, and generated", ["kind"], **own)
        self.seconds = Histogram("request_seconds", "To the last byte", ["path"], buckets=_SECONDS, **own)
        self.first = Histogram("first_token_seconds", "To the first token", buckets=_SECONDS, **own)
        self.rate = Histogram(
            "tokens_per_second", "Of an answer, after its first token",
            buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000), **own,
        )

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def count(self, path: str, status: int, here: Facts) -> None:
        """A request that is over."""
        self.requests.labels(path, str(status)).inc()
        self.seconds.labels(path).observe(time.monotonic() - here.begin)
        known = here.known
        for kind in ("prompt", "cached", "completion", "reasoning"):
            self.tokens.labels(kind).inc(known.get(f"{kind}_tokens", 0))
        if "first_token_seconds" in known:
            self.first.observe(known["first_token_seconds"])
        if known.get("tokens_per_second"):
            self.rate.observe(known["tokens_per_second"])


class _Now(Collector):
    """What is there at the moment of asking."""

    def __init__(self, gate: Gate, models: Registry):
        self._gate, self._models = gate, models

    def collect(self) -> Iterator[GaugeMetricFamily]:
        yield GaugeMetricFamily("mimoflash_answers_under_way", "Running or waiting", self._gate.taken)
        yield GaugeMetricFamily("mimoflash_capacity", "Answers at a time", self._gate.capacity)
        kinds: dict[str, GaugeMetricFamily] = {}
        for name, served in list(self._models.loaded.items()):
            stats = served.engine.stats()
            values = {f"engine_{key}": value for key, value in stats.items() if isinstance(value, int | float)}
            values |= {f"engine_cache_used_bytes_{kind}": value for kind, value in stats["cache_used_bytes"].items()}
            for key, value in values.items():
                new = GaugeMetricFamily(f"mimoflash_{key}", "See Engine.stats", labels=["model"])
                kinds.setdefault(key, new).add_metric([name], value)
        yield from kinds.values()
