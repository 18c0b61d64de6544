"""Training state: what goes in comes out, and a kill, a full disk or a flipped bit cost one checkpoint at most."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimoflash.checkpoint import latest, load_training_state, save_training_state, training_state

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
tensors = st.builds(
    lambda shape, dtype: torch.randint(0, 2, shape).to(dtype), st.lists(st.integers(0, 3), max_size=3), dtypes
)
trees = st.recursive(
    scalars | tensors,
    lambda t: st.lists(t, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(), t, max_size=3),
    max_leaves=12,
)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a)


@settings(max_examples=40, deadline=None)
@given(state=st.dictionaries(st.sampled_from(["model", "rng", "__tensor__", "__pairs__"]) | st.integers(), trees))
def test_every_tree_comes_back(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("run")
    save_training_state(folder, 7, state)
    step, loaded = load_training_state(folder)
    assert step == 7
    assert same(state, loaded)


def test_an_optimizer_goes_on_as_if_nothing_had_happened(tmp_path):
    def build():
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def train(model, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(3, 4)).square().sum().backward()
            optimizer.step()

    model, optimizer = build()
    train(model, optimizer, 3)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    save_training_state(tmp_path, 3, state)
    train(model, optimizer, 3)

    resumed, optimizer = build()
    _, state = load_training_state(tmp_path)
    resumed.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    train(resumed, optimizer, 3)
    assert torch.equal(model.weight, resumed.weight)


def test_views_of_one_memory_are_stored_each(tmp_path):
    x = torch.arange(12.0).view(3, 4)
    save_training_state(tmp_path, 0, {"all": x, "row": x[1], "column": x[:, 1], "again": x})
    _, state = load_training_state(tmp_path)
    assert same(state, {"all": x, "row": x[1], "column": x[:, 1], "again": x})


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 10, 9):
        save_training_state(tmp_path, step, {"step": step}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000009", "step-00000010"]
    assert load_training_state(tmp_path) == (10, {"step": 10})
    save_training_state(tmp_path, 10, {"step": "again"})
    assert load_training_state(tmp_path) == (10, {"step": "again"})


def test_nothing_there_is_no_error(tmp_path):
    assert load_training_state(tmp_path) is None
    assert latest(tmp_path / "absent") is None


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: flip(path / "tensors.safetensors", -1), "tensors.safetensors is damaged"),
        (lambda path: flip(path / "state.json", 3), "state.json is damaged"),
        (lambda path: os.truncate(path / "tensors.safetensors", 60), "tensors.safetensors is missing or cut off"),
        (lambda path: (path / "state.json").unlink(), "state.json is missing"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json is missing or damaged"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing or damaged"),
    ],
)
def test_a_damaged_one_is_passed_over_aloud(tmp_path, harm, message):
    save_training_state(tmp_path, 1, {"x": torch.ones(5)})
    harm(save_training_state(tmp_path, 2, {"x": torch.zeros(5)}))
    with pytest.warns(UserWarning, match=rf"step-00000002: {message}.*the checkpoint before it is taken"):
        step, state = load_training_state(tmp_path)
    assert step == 1
    assert torch.equal(state["x"], torch.ones(5))
    harm(tmp_path / "step-00000001")
    every = pytest.raises(ValueError, match="every checkpoint in it is damaged")
    with pytest.warns(UserWarning, match=r"step-0000000[12]"), every:
        load_training_state(tmp_path)


def test_another_format_is_refused(tmp_path):
    manifest = save_training_state(tmp_path, 1, {}) / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 2}))
    with pytest.raises(ValueError, match="format 2; this version reads 1"):
        load_training_state(tmp_path)


def test_what_cannot_be_stored_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"state\.a\[1\]\.b: a set cannot be stored"):
        save_training_state(tmp_path, 1, {"a": [0, {"b": {1}}]})
    with pytest.raises(ValueError, match="a key is neither a string nor an int"):
        save_training_state(tmp_path, 1, {"a": {1.5: 0}})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("I/O error: ... (os error 28)")]
)
def test_a_full_disk_leaves_the_last_one(tmp_path, monkeypatch, error):
    save_training_state(tmp_path, 1, {"x": torch.ones(5)})

    def full(tensors, file):
        file.write_bytes(b"half")
        raise error

    monkeypatch.setattr(training_state, "save_file", full)
    with pytest.raises(OSError, match=r"disk is full: .*step-00000002 was not written") as raised:
        save_training_state(tmp_path, 2, {"x": torch.zeros(5)})
    assert raised.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert load_training_state(tmp_path)[0] == 1


WRITER = """
import sys, torch
from mimoflash.checkpoint import save_training_state
print("ready", flush=True)
step = int(sys.argv[2])
while True:
    step += 1
    save_training_state(sys.argv[1], step, {"step": step, "x": torch.full((100_000,), float(step))})
    print(step, flush=True)
"""


@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=pytest.mark.long)])
def test_killed_at_any_moment(tmp_path, kills):
    """The last step that was reported written is there, whole; what the killed ones left behind goes."""
    written = 0
    for kill in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(written)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.05 + 0.037 * (kill % 7))
        process.send_signal(signal.SIGKILL)
        reported = [int(line) for line in process.stdout.read().split()]
        process.wait()
        written = max(reported, default=written)
        if written or latest(tmp_path):
            step, state = load_training_state(tmp_path)
            assert step >= written
            assert state["step"] == step
            assert (state["x"] == step).all()
            written = step
    save_training_state(tmp_path, written + 1, {})
    assert len(list(tmp_path.iterdir())) == 2
