"""Adapters: their formula, what they train and what they leave alone, and everyone who reads a model's weights."""

import copy
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from mimoflash.checkpoint import load_delta, save_delta, save_model
from mimoflash.config import ModelConfig
from mimoflash.data import Batch
from mimoflash.engine import Engine, SamplingParams, backend
from mimoflash.kernels import native
from mimoflash.model import Transformer
from mimoflash.train import (
    Trainer,
    add_lora,
    language_model_loss,
    lora_state,
    merge_lora,
    merged_state,
    read_lora,
    save_lora,
    using_lora,
)

TOKENS = torch.randint(0, 128, (4, 24), generator=torch.Generator().manual_seed(3))
MATRICES = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "gate_proj.weight", "up_proj.weight",
            "down_proj.weight", "experts.gate_up_proj", "experts.down_proj")  # fmt: skip


def plain(seed=0, **changes):
    torch.manual_seed(seed)
    return Transformer(ModelConfig.tiny(**{"num_nextn_predict_layers": 1, "initializer_range": 0.1} | changes))


def adapted(rank=3, seed=0, **changes):
    """Adapters that change something, on the plain model of the same seed."""
    model = plain(seed, **changes)
    add_lora(model, rank)
    disturb(model)
    return model


@torch.no_grad()
def disturb(model):
    for pair in lora_state(model).values():
        pair.b.copy_(torch.randn_like(pair.b) * 0.02)


def batch_of(tokens=TOKENS):
    places = torch.arange(tokens.shape[1]).expand_as(tokens)
    return Batch(tokens, torch.zeros_like(tokens), places, torch.ones(tokens.shape))


def adapted_names(model):
    return [name for name in model.state_dict() if name.startswith("model.layers.") and name.endswith(MATRICES)]


def trained(model, steps, lr=1e-2, **options):
    trainer = Trainer(model, weight_decay=0.0, expert_bias_step=0.0, **options)
    losses = [trainer.step([batch_of()], language_model_loss, lr)["loss"] for _ in range(steps)]
    return trainer, losses


def test_adding_changes_nothing_and_leaves_adapters_alone_to_train():
    base, model = plain(), plain()
    add_lora(model, 5)
    assert torch.equal(model(TOKENS), base(TOKENS))
    assert all(torch.equal(a, b) for a, b in zip(model.mtp_logits(TOKENS), base.mtp_logits(TOKENS), strict=True))
    state = base.state_dict()
    names = adapted_names(base)
    assert lora_state(model).keys() == set(names)
    matrices = [(max(1, state[n].dim() == 3 and len(state[n])), *state[n].shape[-2:]) for n in names]
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == sum(n * 5 * (rows + columns) for n, rows, columns in matrices)
    assert [p for p in trainable if not p.numel()] == []
    assert len(Trainer(model).parameters) == 2 * len(names) == 2 * (4 * 4 + 3 + 3 * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_those_of_the_formula(dtype):
    """d/dA = s B^T G, d/dB = s G A^T, with the gradient G of the weight that the model computes with, from a plain
    model in float64: through attention, dense FFN, and the experts in groups (float32) and one by one."""
    model, reference = adapted(rank=3), plain().double()
    scale = 32 / 3
    with torch.no_grad():
        for name, pair in lora_state(model).items():
            weight = dict(reference.named_parameters())[name]
            for index in range(len(weight)) if weight.dim() == 3 else [...]:
                weight[index] += scale * pair.b.double()[index] @ pair.a.double()[index]
    model.to(dtype)
    language_model_loss(model, batch_of()).total.backward()
    language_model_loss(reference, batch_of()).total.backward()
    named = dict(model.named_parameters())
    for name, pair in lora_state(model).items():
        path, _, own = name.rpartition(".")
        a, b = (named[f"{path}.parametrizations.{own}.0.{letter}"].grad.double() for letter in "ab")
        grad = reference.get_parameter(name).grad
        want_a, want_b = scale * pair.b.double().mT @ grad, scale * grad @ pair.a.double().mT
        tolerance = 1e-4 if dtype == torch.float32 else 1e-7  # of A's float32 values, widened
        assert_close(a, want_a, rtol=0, atol=tolerance * want_a.abs().max().item())
        assert_close(b, want_b, rtol=0, atol=tolerance * want_b.abs().max().item())
        if a.dim() == 3:
            assert (b.flatten(1).abs().amax(1) > 0).sum() > 1  # several experts learn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_moves_adapters_only(dtype):
    model, base = plain().to(dtype), plain().to(dtype)
    add_lora(model, 4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    _, losses = trained(model, 4, dtype=dtype, clip=1e9)
    assert losses[-1] < losses[0] - 0.05
    for name, p in model.named_parameters():
        is_adapter = name.endswith((".0.a", ".0.b"))
        assert torch.equal(p, before[name]) != is_adapter, name
    merged = merged_state(model)
    assert {n for n, t in base.named_parameters() if not torch.equal(t, merged[n])} == set(adapted_names(base))


def test_full_rank_fits_what_full_training_of_the_same_weights_fits():
    """A batch by heart, as far as the frozen head allows; in a rank of 1 there is not room enough."""

    def last_loss(rank):
        model = plain(initializer_range=0.05)
        if rank:
            add_lora(model, rank, alpha=rank)
        else:
            model.requires_grad_(False)
            for name in adapted_names(model):
                model.get_parameter(name).requires_grad_(True)
        _, losses = trained(model, 60, lr=5e-3)
        return losses[-1]

    full, full_rank, narrow = (last_loss(rank) for rank in (0, 64, 1))
    assert full < 1.9  # of nearly 5 at first
    assert full_rank < full + 0.03
    assert narrow > full + 0.5


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}])
def test_merging_keeps_what_the_model_computes_and_makes_it_plain(changes):
    model, base = adapted(**changes), plain(**changes)
    logits, places = model(TOKENS), {n: p.data_ptr() for n, p in model.named_parameters()}
    assert not torch.allclose(logits, base(TOKENS), atol=1e-2)

    state = merged_state(model)
    assert torch.equal(model(TOKENS), logits)  # not changed by it
    assert len(lora_state(model)) == len(adapted_names(base))
    other = plain(seed=1, **changes)
    other.load_state_dict(state)
    assert torch.equal(other(TOKENS), logits)

    merge_lora(model)
    assert list(model.state_dict()) == list(base.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert torch.equal(model(TOKENS), logits)
    assert all(p.requires_grad for p in model.parameters())
    for name in adapted_names(base):  # in place, for whoever reads them where they lie
        path, _, own = name.rpartition(".")
        assert model.get_parameter(name).data_ptr() == places[f"{path}.parametrizations.{own}.original"]
    add_lora(model, 2)  # and again
    assert torch.equal(model(TOKENS), logits)
    assert merged_state(base).keys() == base.state_dict().keys()


@pytest.mark.parametrize("runner", ["torch", "native"])
@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_an_engine_plays_what_is_trained(runner, dtype, monkeypatch):
    if runner == "torch":
        monkeypatch.setattr(backend, "_native_is_available", lambda: False)
    elif not native.available():
        pytest.skip("no compiled kernels")
    params = SamplingParams(max_tokens=12)

    def says(engine):
        outputs = engine.generate([[1, 2, 3], [4, 5, 6, 7]], params)
        return [out.tokens for out in outputs], [out.logprobs for out in outputs]

    def merged(model):
        other = plain(seed=2)
        other.load_state_dict(merged_state(model))
        return Engine(other, dtype=dtype)

    model = plain()
    before = says(Engine(model, dtype=dtype))
    add_lora(model, 3)
    engine = Engine(model, dtype=dtype)
    first = says(engine)
    trained(model, 2)
    engine.update_weights()
    second = says(engine)
    assert before == first != second
    assert second == says(Engine(model, dtype=dtype))
    if (runner, dtype) == ("torch", "bf16"):  # W0, A and B are rounded there, not W
        return
    assert second == says(merged(model))
    beside = Engine(plain(seed=4), dtype=dtype)  # a plain model, for rollouts alone
    beside.update_weights(merged_state(model))
    assert says(beside) == second


def test_a_resumed_run_goes_on_bit_by_bit():
    model = adapted()
    trainer, _ = trained(model, 2)
    state = copy.deepcopy(trainer.state())
    steps = [trainer.step([batch_of()], language_model_loss, 1e-2) for _ in range(2)]
    resumed = adapted(seed=5)  # other weights and adapters
    again = Trainer(resumed, weight_decay=0.0, expert_bias_step=0.0)
    again.load_state(state)
    assert [again.step([batch_of()], language_model_loss, 1e-2) for _ in range(2)] == steps
    assert torch.equal(resumed(TOKENS), model(TOKENS))


def test_a_copy_is_adapted_too_and_apart():
    model = adapted()
    other = copy.deepcopy(model)
    logits = model(TOKENS)
    assert torch.equal(other(TOKENS), logits)
    trained(other, 1)
    assert torch.equal(model(TOKENS), logits)
    assert not torch.equal(other(TOKENS), logits)


def test_a_rank_without_room_adapters_twice_and_none_are_refused(tmp_path):
    model = plain()
    with pytest.raises(ValueError, match="rank is 0"):
        add_lora(model, 0)
    for call in (lora_state, partial(save_lora, file=tmp_path / "lora")):
        with pytest.raises(ValueError, match="no adapters: add them first"):
            call(model)
    assert list(tmp_path.iterdir()) == []
    add_lora(model, 1)
    with pytest.raises(ValueError, match="merge them first"):
        add_lora(model, 1)
    with pytest.raises(ValueError, match="merge them first"):
        save_model(model, tmp_path / "model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_adapters_are_merged_into_their_base_bit_for_bit(dtype, tmp_path):
    model, base = plain().to(dtype), plain().to(dtype)
    add_lora(model, 3)
    trained(model, 2, dtype=dtype)
    save_lora(model, tmp_path / "teacher")
    size = (tmp_path / "teacher").stat().st_size
    assert size < 1.3 * sum(p.nbytes for p in model.parameters() if p.requires_grad)
    load_delta(tmp_path / "teacher", base)
    want = merged_state(model)
    assert [name for name, tensor in base.state_dict().items() if not torch.equal(tensor, want[name])] == []
    with pytest.raises(ValueError, match="to the base"):
        load_delta(tmp_path / "teacher", plain(seed=1).to(dtype))


def test_teachers_are_scored_on_the_students_base(tmp_path):
    """Of other ranks, without another model; the student is as before, in training too."""
    files = [tmp_path / name for name in ("narrow", "wide")]
    wants = []
    for file, rank in zip(files, (1, 5), strict=True):
        teacher = adapted(rank)
        save_lora(teacher, file)
        wants.append(teacher(TOKENS).detach())
    student = adapted(3)
    trainer, _ = trained(student, 1)
    twin = copy.deepcopy(trainer)
    own = student(TOKENS)
    teachers = [read_lora(file, student) for file in files]
    for pairs, want in zip(teachers * 2, wants * 2, strict=True):
        with using_lora(student, pairs), torch.no_grad():
            assert torch.equal(student(TOKENS), want)
        assert torch.equal(student(TOKENS), own)
    with pytest.raises(RuntimeError, match="broken off"), using_lora(student, teachers[0]):
        raise RuntimeError("broken off")
    assert torch.equal(student(TOKENS), own)
    for each in (trainer, twin):
        each.step([batch_of()], language_model_loss, 1e-2)
    assert torch.equal(trainer.model(TOKENS), twin.model(TOKENS))


def test_teachers_of_another_base_or_kind_are_refused(tmp_path):
    student, whole = adapted(), plain(seed=1)
    save_lora(adapted(seed=1), tmp_path / "other")
    with pytest.raises(ValueError, match="other: is a delta to the base"):
        read_lora(tmp_path / "other", student)
    save_delta(whole.state_dict(), plain().state_dict(), tmp_path / "whole")
    with pytest.raises(ValueError, match=r"whole: .* is no adapter"):
        read_lora(tmp_path / "whole", student)
    pairs = lora_state(student)
    pairs.popitem()
    own = student(TOKENS)
    with pytest.raises(ValueError, match="one side only"), using_lora(student, pairs):
        pass
    assert torch.equal(student(TOKENS), own)
