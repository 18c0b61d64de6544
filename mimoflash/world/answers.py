"""Reading what an assistant's message says, whatever it is: nothing here raises, however odd the message."""

import json
import re
from typing import Any

from mimoflash.world.protocol import Message

# A minus only where it cannot be the operator of a difference; thousands may be set off by commas.
_NUMBER = re.compile(r"(?:(?<![\w)])-)?[0-9]+(?:,[0-9]{3}(?![0-9]))*(?:\.[0-9]+)?")


def content_of(message: Message) -> str:
    """The message's content as text; "" where there is none or it is not text."""
    content = message.get("content") if isinstance(message, dict) else None
    return content if isinstance(content, str) else ""


def last_number(text: str) -> str | None:
    """The last number in the text in plain decimal form ("1,234.50" gives "1234.5"), or None.

    Text and not int: it may have any number of digits.
    """
    last = None
    for last in _NUMBER.finditer(text):  # noqa: B007
        pass
    if last is None:
        return None
    sign, digits = ("-", last[0][1:]) if last[0].startswith("-") else ("", last[0])
    whole, _, fraction = digits.replace(",", "").partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    number = f"{whole}.{fraction}" if fraction else whole
    return number if number == "0" else sign + number


def same_answer(given: str, wanted: str) -> bool:
    """Whether an answer's text says what is wanted: the same but for space around it, or, where a plain number is
    wanted, that number as its last."""
    given, wanted = given.strip(), wanted.strip()
    return given == wanted or (_NUMBER.fullmatch(wanted) is not None and last_number(given) == last_number(wanted))


def calls_of(message: Message) -> list[tuple[str, dict[str, Any]]]:
    """The message's tool calls as (name, arguments), arguments given as an object or as JSON text.

    A call that is not of that form is ("", {}), which no tool is called: it counts, but as a wrong call.
    """
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    return [_read_call(call) for call in calls] if isinstance(calls, list) else []


def _read_call(call: Any) -> tuple[str, dict[str, Any]]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return "", {}
    name, arguments = function.get("name"), function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return "", {}
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return "", {}
    return name, arguments


def same_value(given: Any, wanted: Any) -> bool:
    """Equality of JSON values with their types: 1, 1.0, true and "1" are four values. NaN equals nothing."""
    if type(given) is not type(wanted):
        return False
    if isinstance(wanted, list):
        return len(given) == len(wanted) and all(map(same_value, given, wanted))
    if isinstance(wanted, dict):
        return given.keys() == wanted.keys() and all(same_value(given[key], wanted[key]) for key in wanted)
    return bool(given == wanted)
