"""The README's lines work: each command's words are known to the command line, each import is there."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main
from scripted import ScriptedEngine, served

from mimoflash.checkpoint import save_model
from mimoflash.cli import app
from mimoflash.config import ModelConfig
from mimoflash.model import Transformer
from mimoflash.text import train_tokenizer

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)
COMMANDS = [
    line.split("#")[0].strip()
    for language, block in BLOCKS
    if language == "sh"
    for line in block.splitlines()
    if line.startswith("mimoflash ")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood(command):
    words, click_command = shlex.split(command)[1:], typer.main.get_command(app)
    context = click_command.make_context("mimoflash", list(words), resilient_parsing=True)
    while hasattr(click_command, "get_command"):
        click_command = click_command.get_command(context, words.pop(0))
        assert click_command is not None, command
    click_command.make_context(command, words)  # raises on an unknown option or a missing argument


def test_there_are_commands():
    assert len(COMMANDS) >= 5


@pytest.fixture
def server():
    """What `mimoflash serve runs/demo` would be."""
    engine = ScriptedEngine(train_tokenizer(["What is 3 + 4?"] * 9, 300), lambda _: "<think>3 + 4</think>7")
    with served({"demo": engine}) as url:
        yield url


def test_the_programs_run(tmp_path, monkeypatch, capsys, server):
    tokenizer = train_tokenizer(["What is 3 + 4?"] * 9, 300)
    config = ModelConfig.tiny(vocab_size=-(-tokenizer.vocab_size // 64) * 64, num_nextn_predict_layers=3)
    save_model(Transformer(config), tmp_path / "model", tokenizer=tokenizer)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for program in [block for language, block in BLOCKS if language == "python"]:
        if file := re.match(r"# (\w+\.py)\n", program):
            Path(file[1]).write_text(program)
        else:
            program = program.replace("http://127.0.0.1:8000", server)
            exec(program.replace("runs/demo/sft/model", str(tmp_path / "model")), names)
    assert (names["answer"].choices[0].message.reasoning_content, names["answer"].choices[0].message.content) == (
        "3 + 4", "7"
    )
    assert len(names["drafts"]) == 3
    assert names["outputs"][0].tokens
    assert capsys.readouterr().out.split() == ["1", "0.0", "2", "0.0"]
