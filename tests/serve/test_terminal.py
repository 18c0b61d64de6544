import io
import signal

import pytest
import torch
from rich.console import Console

from mimoflash.config import ModelConfig
from mimoflash.engine import Engine, SamplingParams
from mimoflash.model import Transformer
from mimoflash.serve.terminal import _Printer, converse
from mimoflash.text import ChatParser, train_tokenizer


def shown(*pieces):
    file = io.StringIO()
    printer, parser = _Printer(Console(file=file, emoji=False, width=20)), ChatParser()
    for piece in pieces:
        printer.show(parser.feed(piece))
    printer.show(parser.finish())
    return file.getvalue()


def test_what_follows_the_reasoning_stands_on_its_own_line():
    assert shown("<think>a+", "b</think>", "19") == "a+b\n19"
    call = "<tool_call><function=f><parameter=x>1</parameter></function></tool_call>"
    assert shown("hm", call) == 'hm\n{"name": "f", "arguments": "{\\"x\\": \\"1\\"}"}'


def test_text_is_printed_as_the_model_wrote_it():
    text = "{':key:': [bold]1[/bold]} and a line that is longer than the console is wide"
    assert shown(text) == text


# -- talking ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def engine():
    """A model that knows nothing, with a context of 200 tokens."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["What is the way to the world?"] * 20, 300)
    size = -(-tokenizer.vocab_size // 64) * 64
    return Engine(Transformer(ModelConfig.tiny(vocab_size=size, max_position_embeddings=200)), tokenizer)


def talk(engine, monkeypatch, capsys, *said, max_tokens=20):
    """What is printed while these turns are said, and then no more."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in said)))
    converse(engine, SamplingParams(max_tokens=max_tokens, ignore_stop_tokens=True), thinking=False)
    return capsys.readouterr().out


def interrupt_at(engine, monkeypatch, *passes):
    """Ctrl-C in these passes of the model, counted from 1."""
    step, count = engine.step, iter(range(1, 1000))

    def interrupted():
        if next(count) in passes:
            signal.raise_signal(signal.SIGINT)
        return step()

    monkeypatch.setattr(engine, "step", interrupted)


def test_an_interrupted_answer_ends_and_its_cache_is_kept(engine, monkeypatch, capsys):
    interrupt_at(engine, monkeypatch, 5)
    before = signal.getsignal(signal.SIGINT)
    assert "(stopped)" in talk(engine, monkeypatch, capsys, "What is?")
    assert signal.getsignal(signal.SIGINT) is before
    stats = engine.stats()
    assert stats["tokens_generated"] == 5
    assert stats["kept"] == 1
    assert stats["running"] == stats["waiting"] == 0


def test_after_an_interrupted_answer_the_conversation_goes_on(engine, monkeypatch, capsys):
    interrupt_at(engine, monkeypatch, 1, 3)  # the second time in the second answer
    out = talk(engine, monkeypatch, capsys, "What is?", "The way?", "What?")
    assert out.count("(stopped)") == 2
    assert len(out.splitlines()) >= 3


def test_a_second_interrupt_leaves_the_chat(interruptible, engine, monkeypatch, capsys):
    interrupt_at(engine, monkeypatch, 3, 4)
    monkeypatch.setattr("mimoflash.serve.terminal._end_soon", lambda request: None)  # as if the third took long
    with pytest.raises(KeyboardInterrupt):
        talk(engine, monkeypatch, capsys, "What is?")


def test_a_full_context_is_told_and_the_conversation_begins_anew(engine, monkeypatch, capsys):
    out = talk(engine, monkeypatch, capsys, *["What is the way?"] * 6, max_tokens=60)
    assert "begins anew" in out
    assert "Traceback" not in out


def test_an_answer_that_fills_the_context_says_so(engine, monkeypatch, capsys):
    assert "context is full" in talk(engine, monkeypatch, capsys, "What is?", max_tokens=500)


def test_what_is_too_long_by_itself_is_passed_over(engine, monkeypatch, capsys):
    out = talk(engine, monkeypatch, capsys, "What is?", "xyz " * 200, "The way?")
    assert "begins anew" in out
    assert "Say something shorter" in out
    assert engine.stats()["tokens_generated"] == 40
