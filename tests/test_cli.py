"""The command line as a user meets it: real processes, real files."""

import os
import subprocess
import sys

import pytest
import torch

from mimoflash.checkpoint import cached_smol, save_model
from mimoflash.config import ModelConfig
from mimoflash.model import Transformer
from mimoflash.text import train_tokenizer


def mimoflash(*arguments, text="", cwd=None):
    done = subprocess.run(
        [sys.executable, "-m", "mimoflash.cli", *arguments], input=text, capture_output=True, text=True, cwd=cwd,
        env=os.environ | {"COLUMNS": "120"},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that knows nothing, with a tokenizer."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["What is the way to the world?"] * 20, 300)
    size = -(-tokenizer.vocab_size // 64) * 64
    path = tmp_path_factory.mktemp("model") / "tiny"
    save_model(Transformer(ModelConfig.tiny(vocab_size=size)), path, tokenizer=tokenizer)
    return path


def test_generate_continues_a_text(folder):
    code, out, err = mimoflash("generate", str(folder), "What is", "--max-tokens", "5")
    assert code == 0, err
    assert out.startswith("What is")
    assert mimoflash("generate", str(folder), "-", "--max-tokens", "5", text="What is")[1] == out
    assert mimoflash("generate", str(folder), "", "--max-tokens", "3")[0] == 0


def test_chat_answers_turn_by_turn_until_its_input_ends(folder):
    code, out, err = mimoflash("chat", str(folder), "--max-tokens", "6", "--seed", "1", text="What is?\n\nThe way?\n")
    assert code == 0, err
    assert len(out.strip()) > 0
    assert mimoflash("chat", str(folder), text="")[0] == 0


def test_convert_and_back(folder, tmp_path):
    code, _, err = mimoflash("convert", str(folder), str(tmp_path / "m.gguf"), "--format", "gguf", "--dtype", "float32")
    assert code == 0, err
    code, _, err = mimoflash("convert", str(tmp_path / "m.gguf"), str(tmp_path / "back"), "--dtype", "float32")
    assert code == 0, err
    one = mimoflash("generate", str(folder), "What is", "--max-tokens", "8")
    assert one == mimoflash("generate", str(tmp_path / "back"), "What is", "--max-tokens", "8")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "nowhere", "x"], "no such folder"),
        (["chat", "nowhere"], "no such folder"),
        (["run", "nothing"], "no such recipe"),
        (["run", "demo", "--set", "pretrain.tokens=-1"], "tokens is -1"),
        (["generate", "FOLDER", "x", "--top-p", "2"], "top_p is 2"),
        (["generate", "FOLDER", "x", "--max-tokens", "0"], "max_tokens is 0"),
        (["convert", "FOLDER", "OUT.gguf", "--format", "gguf", "--dtype", "fp8"], "fp8"),
        (["bench", "train", "--shape", "huge"], "nano, small"),
    ],
)
def test_a_mistake_is_one_line_and_no_traceback(arguments, said, folder, tmp_path):
    arguments = [a.replace("FOLDER", str(folder)).replace("OUT", str(tmp_path / "out")) for a in arguments]
    code, _, err = mimoflash(*arguments, cwd=tmp_path)
    assert code == 1
    assert said in err
    assert "Traceback" not in err


@pytest.mark.skipif(not cached_smol().exists(), reason="smol has not been fetched: mimoflash generate smol x")
def test_smol_knows_the_capital_of_france():
    code, out, err = mimoflash("generate", "smol", "The capital of France is", "--max-tokens", "8")
    assert code == 0, err
    assert "Paris" in out
