import io

from rich.console import Console

from mimoflash.serve.terminal import _Printer
from mimoflash.text import ChatParser


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
