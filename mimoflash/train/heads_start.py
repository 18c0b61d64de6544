"""What the training of MTP layers begins with: the trunk's hidden states, a draft vocabulary, and first weights."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mimoflash.data import ShardReader
from mimoflash.model import Transformer
from mimoflash.model.mtp import MTPLayer
from mimoflash.train.heads import HeadsSettings

_RIDGE = 1e-2  # of the mean square of what is multiplied


def draft_vocabulary(shards: Sequence[ShardReader], size: int, vocab_size: int) -> Tensor:
    """The `size` tokens that the text has most, ids sorted. Where it has fewer, the lowest ids follow: what a BPE has
    merged first is frequent in any text."""
    counts = sum(np.bincount(shard.tokens, minlength=vocab_size) for shard in shards)
    most = np.argsort(-counts, kind="stable")[:size]
    return torch.from_numpy(np.sort(most))


@torch.inference_mode()
def remember_hidden(model: Transformer, shard: ShardReader, file: Path) -> NDArray[np.float16]:
    """The trunk's hidden states at the shard's tokens (N, H), before its final norm, from `file`, written if there is
    none. Documents run one by one: of a few hundred tokens they reach the speed of longer ones already."""
    if not file.exists():
        states = []
        for index in range(len(shard)):
            tokens = torch.from_numpy(shard.document(index)[0].astype(np.int64))
            hidden = model.trunk(tokens[None].to(model.lm_head.weight.device)).hidden
            states.append(hidden[0].to("cpu", torch.float16).numpy())
        temporary = file.with_suffix(".tmp")
        with temporary.open("wb") as out:
            np.save(out, np.concatenate(states) if states else np.zeros((0, model.config.hidden_size), np.float16))
        temporary.replace(file)
    return np.load(file, mmap_mode="r")


@torch.no_grad()
def add_heads(
    model: Transformer, shards: Sequence[ShardReader], hidden: Sequence[NDArray[np.float16]], settings: HeadsSettings
) -> None:
    """Adds MTP layers up to `settings.layers`, each near to what it has to become (docs/log.md).

    The first is the trunk's last layer, where the shapes are those of an MTP layer, and its `eh_proj` the least-squares
    fit to what enters that layer one place later. Each further one is the layer before it, its `eh_proj` fitted to give
    what that one gives one place later. `settings.fit_tokens` of the text tell.
    """
    for k in range(len(model.model.mtp.layers), settings.layers):
        model.set_mtp_layers(k + 1)
        if k == 0:
            _take_over(_layer(model, 0), model)
        inputs, targets = [], []
        for tokens, states in _documents(shards, hidden, settings.fit_tokens):
            inputs.append(_projected(model, k, tokens[1 + k :], states[: -1 - k]))
            if k == 0:
                targets.append(_entering_last_layer(model, tokens)[1:])
            else:
                later = _projected(model, k - 1, tokens[1 + k :], states[1:-k])
                targets.append(_layer(model, k - 1).eh_proj(later))
        _layer(model, k).eh_proj.weight.copy_(_least_squares(torch.cat(inputs), torch.cat(targets)))


def _documents(
    shards: Sequence[ShardReader], hidden: Sequence[NDArray[np.float16]], count: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens (L,) and hidden states (L, H) float32 of the first documents, until they have `count` tokens."""
    for shard, states in zip(shards, hidden, strict=True):
        for index in range(len(shard)):
            if count <= 0:
                return
            tokens = torch.from_numpy(shard.document(index)[0].astype(np.int64))
            end = int(shard.ends[index])
            yield tokens, torch.from_numpy(states[end - len(tokens) : end].astype(np.float32))
            count -= len(tokens)


def _layer(model: Transformer, k: int) -> MTPLayer:
    layer = model.model.mtp.layers[k]
    assert isinstance(layer, MTPLayer)
    return layer


def _take_over(layer: MTPLayer, model: Transformer) -> None:
    """Weights of the trunk's last layer and final norm, as far as they have a place in an MTP layer."""
    own, last = layer.state_dict(), model.model.layers[-1].state_dict()
    for name, weight in last.items():
        name = name.replace("post_attention_layernorm", "pre_mlp_layernorm")
        if name in own and own[name].shape == weight.shape:
            own[name].copy_(weight)
    norm = model.model.norm.weight
    layer.final_layernorm.weight.copy_(norm)
    layer.hnorm.weight.copy_(norm / norm.square().mean().sqrt())  # dimensions far larger than others are tamed


def _projected(model: Transformer, k: int, tokens: Tensor, hidden: Tensor) -> Tensor:
    """What `eh_proj` of layer k multiplies (L, 2 H)."""
    layer = _layer(model, k)
    embedding = model.model.embed_tokens(tokens.to(model.lm_head.weight.device))
    return torch.cat([layer.enorm(embedding), layer.hnorm(hidden.to(embedding))], dim=-1)


def _entering_last_layer(model: Transformer, tokens: Tensor) -> Tensor:
    """The residual stream before the trunk's last layer (L, H)."""
    caught: list[Tensor] = []
    hook = model.model.layers[-1].register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0][0]))
    try:
        model.trunk(tokens[None].to(model.lm_head.weight.device))
    finally:
        hook.remove()
    return caught[0]


def _least_squares(x: Tensor, y: Tensor) -> Tensor:
    """W (Y, X) of the smallest |x W^T - y|^2 with a little ridge, in float64. A text's first places have hidden states
    far larger than all others: rows count by their targets' size."""
    x, y = x.double(), y.double()
    weight = 1 / y.square().mean(-1, keepdim=True).clamp(min=1e-12)
    gram = x.T @ (weight * x)
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, x.T @ (weight * y)).T
