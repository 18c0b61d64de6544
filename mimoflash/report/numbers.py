"""The figures at the top of a report, and how numbers are written."""

import json
from collections.abc import Iterator
from math import isfinite
from statistics import median
from typing import Any

from mimoflash.report.found import Found


def key_figures(found: Found) -> Iterator[tuple[str, str, str]]:
    """(value, what it is, a remark) of what is known."""
    if counted := found.summary.get("parameters"):
        mtp = f", {short(counted['mtp'])} more in MTP layers" if counted.get("mtp") else ""
        yield short(counted["total"]), "parameters", f"{short(counted['active'])} active for a token{mtp}"
    if tokens := {stage: lines[-1]["tokens"] for stage, lines in found.metrics.items()}:
        yield short(sum(tokens.values())), "tokens seen", ", ".join(f"{s} {short(n)}" for s, n in tokens.items())
    if seconds := found.summary.get("seconds"):
        yield duration(sum(seconds.values())), "in all", ", ".join(f"{s} {duration(n)}" for s, n in seconds.items())
    if rates := _column(found, "tokens_per_second"):
        yield short(median(rates)), "tokens a second in training", "median over the steps"
    if shares := _column(found, "mfu"):
        yield f"{median(shares):.0%}", "of the machine's peak used", "MFU in the dtype it trains in, median"
    if machine := found.summary.get("machine"):
        remark = f"float32 matmul, {machine.get('threads')} threads, torch {machine.get('torch')}"
        yield f"{machine['matmul_gflops']:,.0f}", "GFLOP/s, this machine", remark
    if length := found.evaluated("accept_length"):
        yield f"{length:.2f}", "tokens a step when drafting", "accept length of the MTP layers, on its own answers"


def short(number: float) -> str:
    """4321 as 4.3k: two digits, or three before the point."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            value = number / size
            return f"{value:.0f}{unit}" if abs(value) >= 10 else f"{value:.1f}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _column(found: Found, key: str) -> list[float]:
    return [line[key] for lines in found.metrics.values() for line in lines if isfinite(line.get(key, float("nan")))]
