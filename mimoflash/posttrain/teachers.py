"""Teachers: whoever says how likely it would have written what the student wrote."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import requests
import torch
from requests.adapters import HTTPAdapter
from torch import Tensor
from urllib3.util import Retry

from mimoflash.checkpoint import load_model, swap_in
from mimoflash.config import ModelConfig
from mimoflash.engine import Engine
from mimoflash.model import Transformer
from mimoflash.posttrain.batch import RolloutBatch
from mimoflash.posttrain.policy import view
from mimoflash.posttrain.rollout import tokenizer_of
from mimoflash.text import Tokenizer, load_tokenizer
from mimoflash.world import Domain


@dataclass(frozen=True)
class Scores:
    """Of a batch with N own tokens, natural, at temperature 1: `logp_BT` of the tokens themselves, 0 elsewhere. Where
    they were asked for, `top_logp_NK` of the K likeliest tokens at each of the own places and which these are,
    `top_ids_NK`; of all tokens in order where K is the vocabulary."""

    logp_BT: Tensor
    top_logp_NK: Tensor | None = None
    top_ids_NK: Tensor | None = None


class Teacher(Protocol):
    """`config` is None where it cannot be known."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def config(self) -> ModelConfig | None: ...

    def score(self, batches: Sequence[RolloutBatch], top: int) -> list[Scores]:
        """Of each batch, with the `top` likeliest tokens of each place (0: none)."""
        ...


@dataclass(frozen=True)
class ModelTeacher:
    """A model in memory. It routes freely: the student's routes say nothing of its experts."""

    model: Transformer
    tokenizer: Tokenizer

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @torch.no_grad()
    def score(self, batches: Sequence[RolloutBatch], top: int) -> list[Scores]:
        return [self._score(batch, top) for batch in batches]

    def _score(self, batch: RolloutBatch, top: int) -> Scores:
        seen = view(self.model, batch, replay=False)
        if not top:
            return Scores(seen.token_logp())
        if top >= seen.logp_NV.shape[-1]:
            ids_NV = torch.arange(seen.logp_NV.shape[-1], device=seen.logp_NV.device).expand_as(seen.logp_NV)
            return Scores(seen.token_logp(), seen.logp_NV, ids_NV)
        return Scores(seen.token_logp(), *seen.logp_NV.topk(top, dim=-1))


class StoredTeacher:
    """A model in a folder, or what a file says is different from it (`delta`, see checkpoint.save_delta), taken into
    memory when it is asked: whatever their number, one is held at a time. `shelf` is what they share."""

    def __init__(self, folder: Path, shelf: "Shelf", delta: Path | None = None):
        self.folder, self.shelf, self.delta = folder, shelf, delta
        self.tokenizer = load_tokenizer(folder)
        self.config = ModelConfig.load(folder)

    def score(self, batches: Sequence[RolloutBatch], top: int) -> list[Scores]:
        return ModelTeacher(self.shelf.take(self.folder, self.delta), self.tokenizer).score(batches, top)


class Shelf:
    """Room for one model, whose memory takes the weights of each in turn."""

    def __init__(self, dtype: str = "float32", device: str = "cpu"):
        self._dtype, self._device = dtype, device
        self._model: Transformer | None = None
        self._held: tuple[Path, Path | None] | None = None

    def take(self, folder: Path, delta: Path | None = None) -> Transformer:
        """Raises ValueError as `load_model` and `load_delta` do."""
        if self._model is None or self._model.config != ModelConfig.load(folder):
            self._model = None  # before the next one comes
            self._model, self._held = load_model(folder, dtype=self._dtype, device=self._device), (folder, None)
        if self._held != (folder, delta):
            self._held = None  # until it is whole
            swap_in(self._model, folder, delta)
            self._held = folder, delta
        return self._model


class RemoteTeacher:
    """A model behind an OpenAI-compatible endpoint that returns log-probabilities of prompts, as vLLM's does: POST
    `base_url`/completions with `prompt_logprobs`. `tokenizer` is what the served model was trained with. Raises
    ValueError where an answer lacks them, requests.RequestException where none comes in 1 + `retries` attempts."""

    config = None

    def __init__(
        self, base_url: str, model: str, tokenizer: Tokenizer, *, api_key: str = "", timeout: float = 120.0,
        retries: int = 2,
    ):
        self.model, self.tokenizer = model, tokenizer
        self._url, self._timeout, self._session = f"{base_url.rstrip('/')}/completions", timeout, requests.Session()
        if api_key:
            self._session.headers["Authorization"] = f"Bearer {api_key}"
        again = Retry(retries, backoff_factor=1.0, status_forcelist=(429, 500, 502, 503, 504), allowed_methods=None)
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(max_retries=again))

    def score(self, batches: Sequence[RolloutBatch], top: int) -> list[Scores]:
        return [self._score(batch, top) for batch in batches]

    def _score(self, batch: RolloutBatch, top: int) -> Scores:
        logp_BT = torch.zeros_like(batch.mask_BT)
        likeliest: list[list[tuple[float, int]]] = []
        for row, mask_T in enumerate(batch.mask_BT):
            tokens, start = batch.whole_row(row), int(batch.start_B[row])
            places = self._ask(tokens, top)[start:]
            for place in mask_T.nonzero()[:, 0].tolist():
                logp_BT[row, place] = _logprob(places[place], tokens[start + place])
                best = sorted(((_logprob(places[place], int(t)), int(t)) for t in places[place]), reverse=True)
                # in the order of the ids: where these are all tokens, in the vocabulary's
                likeliest.append(sorted(best[:top], key=lambda pair: pair[1]))
        if not top:
            return Scores(logp_BT)
        if len(counts := {len(best) for best in likeliest}) > 1:
            raise ValueError(f"{self._url} gave {min(counts)} to {max(counts)} tokens a place: {top} were asked for")
        table = torch.tensor(likeliest, dtype=torch.float64)  # (N, K, 2)
        return Scores(logp_BT, table[..., 0].float().to(logp_BT.device), table[..., 1].long().to(logp_BT.device))

    def _ask(self, tokens: list[int], top: int) -> list[Any]:
        asked: Any = {"model": self.model, "prompt": tokens, "max_tokens": 1, "prompt_logprobs": top}
        answer = self._session.post(self._url, json=asked, timeout=self._timeout)
        answer.raise_for_status()
        places = answer.json()["choices"][0].get("prompt_logprobs")
        if not isinstance(places, list) or len(places) != len(tokens):
            raise ValueError(
                f"{self._url} gave no log-probabilities of the prompt: a server is needed that knows "
                "prompt_logprobs"
            )
        return places


def _logprob(place: Mapping[str, Any], token: int) -> float:
    found = place.get(str(token))
    if found is None or not math.isfinite(found["logprob"]):
        raise ValueError(f"the endpoint said nothing of token {token}: it must report the prompt's own tokens")
    return float(found["logprob"])


def check_teachers(engine: Engine, domains: Mapping[str, Domain], teachers: Mapping[str, Teacher]) -> None:
    """Raises ValueError where a domain has no teacher or a teacher no domain, and for a teacher that has other tokens
    than the student, ends its turns by others, or is the student itself."""
    tokenizer = tokenizer_of(engine)
    if not domains:
        raise ValueError("there is no domain to distil in: give one at least")
    if missing := sorted(domains.keys() - teachers.keys()):
        raise ValueError(f"no teacher for {', '.join(missing)}: give each domain one")
    if unknown := sorted(teachers.keys() - domains.keys()):
        raise ValueError(f"a teacher for {', '.join(unknown)}, but the domains are {', '.join(sorted(domains))}")
    for name, teacher in teachers.items():
        if isinstance(teacher, ModelTeacher) and teacher.model is engine.model:
            raise ValueError(f"the teacher of {name} is the student and would move with it: give a copy of the model")
        if teacher.tokenizer.fingerprint != tokenizer.fingerprint:
            raise ValueError(f"the teacher of {name} has another tokenizer than the student: its scores would be noise")
        if teacher.config is None:
            continue
        theirs, ours = teacher.config.vocab_size, engine.model.config.vocab_size
        if theirs != ours:
            raise ValueError(f"the teacher of {name} has a vocabulary of {theirs}, the student one of {ours}")
        theirs_end = _end_tokens(teacher.config, teacher.tokenizer)
        ours_end = _end_tokens(engine.model.config, tokenizer)
        if theirs_end != ours_end:
            raise ValueError(
                f"the teacher of {name} ends its turns by tokens {sorted(theirs_end)}, the student by "
                f"{sorted(ours_end)}: answers would grow without end"
            )


def _end_tokens(config: ModelConfig, tokenizer: Tokenizer) -> set[int]:
    eos = config.eos_token_id
    return {*tokenizer.stop_ids, *((eos,) if isinstance(eos, int) else eos or ())}
