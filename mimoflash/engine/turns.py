"""Threads take turns at something that one of them uses at a time."""

import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


class Turns:
    """A lock that is fair, and that an interrupt (Ctrl-C) never leaves held, wherever it comes.

    Who waits holds the gate. So a thread that has just had its turn and wants the next one finds the gate held, and
    comes after who waited.
    """

    def __init__(self) -> None:
        self._gate, self._lock = threading.Lock(), threading.Lock()

    def run(self, do: Callable[[], Result]) -> Result:
        """What `do` returns, when it is this thread's turn."""
        held: list[bool] = []
        try:
            with self._gate:
                # in one call: Python lets no interrupt come between taking the lock and noting that it is taken
                held.extend(map(self._lock.acquire, (True,)))
            return do()
        finally:
            if held:
                self._lock.release()

    def run_if_free(self, do: Callable[[], object]) -> bool:
        """Runs it if it is nobody's turn; returns whether it did."""
        held: list[bool] = []
        try:
            held.extend(filter(None, map(self._lock.acquire, (False,))))
            if held:
                do()
            return bool(held)
        finally:
            if held:
                self._lock.release()
