"""Models as differences: what comes back is what was, to the last bit, on its own base only."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from mimoflash.checkpoint import LowRank, delta, fingerprint, load_delta, load_model, save_delta, save_model, swap_in


def bits(model):
    return {name: t.detach().contiguous().flatten().view(torch.uint8).clone() for name, t in model.state_dict().items()}


def assert_same_bits(model, other):
    ours, theirs = (x if isinstance(x, dict) else bits(x) for x in (model, other))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def state_of(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


SPECIAL = [float("nan"), -0.0, 1e-42, float("inf")]  # unlike themselves, like 0, denormal


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_differs_is_stored_and_comes_back_bit_for_bit(data, make_model, tmp_path_factory):
    file = tmp_path_factory.mktemp("delta") / "teacher.safetensors"
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    base, teacher = (make_model(num_nextn_predict_layers=1).to(dtype) for _ in range(2))
    for model in (base, teacher):
        model.model.norm.weight[0] = 0.0
    changed = data.draw(st.sets(st.sampled_from(sorted(base.state_dict()))))
    for name in changed:
        tensor = teacher.state_dict()[name].view(-1)
        place = data.draw(st.integers(0, tensor.numel() - 1))
        before = tensor[place].clone()
        tensor[place] = data.draw(st.sampled_from([*SPECIAL, float(before) * 1.25 + 1]))
    if data.draw(st.booleans()):
        teacher.model.norm.weight[0] = -0.0
        changed = changed | {"model.norm.weight"}
    before, after = bits(base), bits(teacher)
    save_delta(teacher.state_dict(), base.state_dict(), file)
    assert set(load_file(file)) == {name for name in before if not torch.equal(before[name], after[name])} <= changed
    load_delta(file, base)
    assert_same_bits(base, teacher)


def test_names_that_are_not_given_are_as_in_the_base(make_model, tmp_path):
    base = make_model()
    norm = base.model.norm.weight + 1
    want = bits(base) | {"model.norm.weight": norm.view(torch.uint8).clone()}
    save_delta({"model.norm.weight": norm}, base.state_dict(), tmp_path / "delta")
    load_delta(tmp_path / "delta", base)
    assert_same_bits(base, want)


def test_another_base_is_refused_with_both_named(make_model, tmp_path):
    base, other, teacher = (make_model(seed) for seed in range(3))
    file = tmp_path / "teacher.safetensors"
    save_delta(teacher.state_dict(), base.state_dict(), file)
    before = bits(other)
    named = [fingerprint(model.state_dict())[:16] for model in (base, other)]
    with pytest.raises(ValueError, match=rf"teacher\.safetensors.* base {named[0]}.* holds {named[1]}"):
        load_delta(file, other)
    with pytest.raises(ValueError, match="to the base"):
        load_delta(file, make_model(0).bfloat16())  # rounded, it is another one
    assert_same_bits(other, before)
    load_delta(file, base)
    with pytest.raises(ValueError, match="to the base"):
        load_delta(file, base)  # it is no longer


@given(data=st.data())
def test_a_fingerprint_is_of_every_bit_and_of_no_order(data):
    tensors = {name: torch.randn(data.draw(st.integers(1, 5)), 3) for name in "abc"}
    first = fingerprint(tensors)
    assert fingerprint(dict(reversed(tensors.items()))) == first
    name, bit = data.draw(st.sampled_from("abc")), data.draw(st.integers(0, 31))
    flipped = tensors[name].clone()
    words = flipped.view(-1).view(torch.int32)
    words[data.draw(st.integers(0, len(words) - 1))] ^= 1 << bit if bit < 31 else -(1 << 31)
    for other in (flipped, tensors[name].view(-1), tensors[name].view(torch.int32)):  # bits, shape, type
        assert fingerprint(tensors | {name: other}) != first
    assert fingerprint({"d" if key == name else key: value for key, value in tensors.items()}) != first


@pytest.mark.parametrize("stack", [(), (5,)])
def test_low_rank_pairs_are_their_formula(stack):
    weight, a, b = (torch.randn(*stack, *shape) for shape in ((12, 20), (3, 20), (12, 3)))
    change = LowRank(a, b, 0.3)
    want = weight.double()
    for row in range(12):
        for k in range(3):
            want[..., row, :] += 0.3 * b.double()[..., row, k, None] * a.double()[..., k, :]
    assert change.shape == weight.shape
    assert_close(change.added_to(weight).double(), want, atol=1e-5, rtol=1e-6)


def test_pairs_are_stored_as_pairs(make_model, tmp_path):
    base = make_model().double()  # in which a scale of few bits would show
    before = state_of(base)
    names = ("model.layers.1.mlp.experts.down_proj", "model.layers.2.self_attn.k_proj.weight")
    pairs = {}
    for name in names:
        *stack, rows, columns = before[name].shape
        pairs[name] = LowRank(*(torch.randn(*stack, *x).double() for x in ((2, columns), (rows, 2))), 1 / 3)
    file = tmp_path / "delta"
    save_delta(before | pairs, before, file)
    stored = sum(pair.a.numel() + pair.b.numel() + 1 for pair in pairs.values())
    assert sum(tensor.numel() for tensor in load_file(file).values()) == stored
    load_delta(file, base)
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, pairs[name].added_to(before[name]) if name in names else before[name])


def test_tied_tensors_are_one(make_model, tmp_path):
    base, teacher = (make_model(seed, tie_word_embeddings=True) for seed in range(2))
    save_delta(teacher.state_dict(), base.state_dict(), tmp_path / "delta")
    load_delta(tmp_path / "delta", base)
    assert_same_bits(base, teacher)
    assert base.lm_head.weight.data_ptr() == base.model.embed_tokens.weight.data_ptr()
    assert "lm_head.weight" not in load_file(tmp_path / "delta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(1)}, "x: the base has no such tensor"),
        ({"model.norm.weight": torch.ones(2)}, r"model\.norm\.weight: is torch\.float32 \(2,\), in the base .*64"),
        ({"model.norm.weight": torch.ones(64).double()}, r"model\.norm\.weight: is torch\.float64"),
        ({"lm_head.weight": LowRank(torch.ones(1, 64), torch.ones(127, 1), 1.0)}, r"lm_head\.weight: .*\(127, 64\)"),
    ],
)
def test_what_does_not_fit_the_base_is_named(make_model, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        save_delta(change, make_model().state_dict(), tmp_path / "delta")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_written_whole_or_not_at_all(make_model, tmp_path, monkeypatch):
    base, teacher = make_model(0), make_model(1)
    file = tmp_path / "delta"
    save_delta({}, base.state_dict(), file)
    before = file.read_bytes()

    def half(tensors, to, metadata):
        to.write_bytes(b"half")
        raise SafetensorError("No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr(delta, "save_file", half)
        with pytest.raises(OSError, match="delta was not written"):
            save_delta(teacher.state_dict(), base.state_dict(), file)
    assert [path.name for path in tmp_path.iterdir()] == ["delta"]
    assert file.read_bytes() == before
    save_delta(teacher.state_dict(), base.state_dict(), file)
    assert [path.name for path in tmp_path.iterdir()] == ["delta"]


def test_damage_is_named_and_changes_nothing(make_model, tmp_path):
    base, file = make_model(), tmp_path / "delta"
    before = bits(base)
    name = "model.layers.2.self_attn.k_proj.weight"
    pair = LowRank(torch.randn(2, 64), torch.randn(len(base.state_dict()[name]), 2), 2.0)
    save_delta({name: pair, "model.norm.weight": torch.ones(64)}, base.state_dict(), file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors, whole = {key: t.clone() for key, t in load_file(file).items()}, file.read_bytes()
    damaged = {key: t for key, t in tensors.items() if not key.endswith("lora_b")}
    for content, says in ((damaged, "lora_b"), (tensors | {"x": torch.ones(1)}, "x: "), (whole[:500], "not a whole")):
        file.unlink()
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            save_file(content, file, metadata)
        with pytest.raises(ValueError, match=rf"delta: .*{says}"):
            load_delta(file, base)
    save_file(tensors, file)
    with pytest.raises(ValueError, match="it is no delta"):
        load_delta(file, base)
    with pytest.raises(ValueError, match="absent: not a whole"):
        load_delta(tmp_path / "absent", base)
    assert_same_bits(base, before)


@pytest.mark.parametrize("changes", [{"num_nextn_predict_layers": 2}, {"tie_word_embeddings": True}])
def test_teachers_take_turns_in_one_model(make_model, tmp_path, changes):
    base, *teachers = (make_model(seed, **changes) for seed in range(3))
    save_model(base, tmp_path / "base")
    save_model(teachers[0], tmp_path / "whole", max_shard_bytes=1e5)
    save_delta(teachers[1].state_dict(), base.state_dict(), tmp_path / "delta")
    held = load_model(tmp_path / "base")
    places = {name: t.data_ptr() for name, t in held.state_dict().items()}
    for _ in range(2):
        swap_in(held, tmp_path / "whole")
        assert_same_bits(held, teachers[0])
        swap_in(held, tmp_path / "base", tmp_path / "delta")
        assert_same_bits(held, teachers[1])
        swap_in(held, tmp_path / "base")
        assert_same_bits(held, base)
    assert {name: t.data_ptr() for name, t in held.state_dict().items()} == places


def test_a_teacher_in_another_type_is_rounded_as_load_model_does(make_model, tmp_path):
    save_model(make_model(1), tmp_path / "teacher")
    save_model(make_model(0), tmp_path / "base")
    held = load_model(tmp_path / "base", dtype="bf16")
    swap_in(held, tmp_path / "teacher")
    assert_same_bits(held, load_model(tmp_path / "teacher", dtype="bf16"))


@pytest.mark.parametrize(
    ("changes", "dtype", "message"),
    [
        ({"hidden_size": 32}, None, "config.json has other hidden_size than"),
        ({"swa_rope_theta": 500.0}, None, "config.json has other swa_rope_theta than"),
        ({}, "fp8", "_scale_inv is not in the model.*no FP8"),
    ],
)
def test_a_teacher_of_another_kind_is_refused_and_changes_nothing(make_model, tmp_path, changes, dtype, message):
    save_model(make_model(1, **changes), tmp_path / "teacher", dtype=dtype)
    held = make_model()
    before = bits(held)
    with pytest.raises(ValueError, match=message):
        swap_in(held, tmp_path / "teacher")
    assert_same_bits(held, before)


def test_a_teacher_whose_files_are_not_its_configs_is_refused(make_model, tmp_path):
    teacher = make_model(1)
    save_model(teacher, tmp_path / "teacher")
    file = tmp_path / "teacher" / "model.safetensors"
    tensors = {name: t.clone() for name, t in load_file(file).items()}
    held = make_model()
    before = bits(held)
    cut = tensors | {"model.norm.weight": torch.ones(2)}
    for stored, says in (
        (cut, r"norm\.weight is \(2,\)"),
        ({k: v for k, v in tensors.items() if k != "model.norm.weight"}, r"model\.norm\.weight is missing"),
    ):
        file.unlink()
        save_file(stored, file)
        with pytest.raises(ValueError, match=says):
            swap_in(held, tmp_path / "teacher")
    assert_same_bits(held, before)
