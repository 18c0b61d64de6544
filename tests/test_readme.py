"""The README's lines work: each command's words are known to the command line, each import is there."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer.main

import mimoflash
from mimoflash.cli import app

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


def test_the_names_it_imports_are_there():
    imported = [
        name.name
        for language, block in BLOCKS
        if language == "python"
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    ]
    assert len(imported) >= 4
    assert all(getattr(mimoflash, name) for name in imported)
