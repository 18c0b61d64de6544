"""Finished rollouts on disk, so that a run that is killed at any moment plays none of them again."""

import base64
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mimoflash.posttrain.rollout import Rollout


class Place(NamedTuple):
    """The rollout `member` of a source's group `number`."""

    source: str
    number: int
    member: int


class Journal:
    """A file of one line a rollout, written when it has finished. What is not JSON in `info` is kept as its text."""

    def __init__(self, file: Path):
        self._file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        self._lines = dict(_read(file)) if file.exists() else {}
        self.keep(lambda place: True)  # without a last line that was cut off

    def find(self, place: Place) -> Rollout | None:
        line = self._lines.get(place)
        return None if line is None else _rollout(json.loads(line)["rollout"])

    def add(self, place: Place, rollout: Rollout) -> None:
        line = json.dumps({"place": place, "rollout": _plain(rollout)}, default=str)
        self._lines[place] = line
        self._out.write(line + "\n")
        self._out.flush()

    def keep(self, is_wanted: Callable[[Place], bool]) -> None:
        """Forgets all others."""
        self._lines = {place: line for place, line in self._lines.items() if is_wanted(place)}
        temporary = self._file.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in self._lines.values()))
        self.close()
        os.replace(temporary, self._file)
        self._out = self._file.open("a")

    def close(self) -> None:
        if hasattr(self, "_out"):
            self._out.close()


def _read(file: Path) -> list[tuple[Place, str]]:
    found = []
    for line in file.read_text().split("\n"):
        try:
            found.append((Place(*json.loads(line)["place"]), line))
        except ValueError:
            break  # the last one, cut off
    return found


def _plain(rollout: Rollout) -> dict[str, Any]:
    fields = {field.name: getattr(rollout, field.name) for field in dataclasses.fields(Rollout)}
    fields["info"] = _plain_info(rollout.info)
    routes = rollout.routes.contiguous()
    data = base64.b64encode(routes.numpy().tobytes()).decode()
    return fields | {"routes": [str(routes.dtype).removeprefix("torch."), list(routes.shape), data]}


def _plain_info(info: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(info, default=str)
        return info
    except (TypeError, ValueError):  # a key that is none in JSON, or something that has itself inside
        return {str(key): str(value) for key, value in info.items()}


def _rollout(plain: dict[str, Any]) -> Rollout:
    dtype, shape, data = plain["routes"]
    raw = bytearray(base64.b64decode(data))
    routes = torch.frombuffer(raw, dtype=getattr(torch, dtype)) if raw else torch.empty(0, dtype=getattr(torch, dtype))
    turns = [tuple(turn) for turn in plain["turns"]]
    return Rollout(
        **plain | {"routes": routes.reshape(shape), "turns": turns, "versions": tuple(plain["versions"])}
    )
