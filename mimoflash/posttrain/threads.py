"""Threads for what may block: as many as there are calls at a time, each used again."""

import queue
import threading
from collections.abc import Callable


class Threads:
    """They keep no process from its end, also where a call hangs: an executor's would."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock, self._idle = threading.Lock(), 0

    def start(self, call: Callable[[], None]) -> None:
        """In some thread, at once. `call` must not raise."""
        with self._lock:
            is_free = self._idle > 0
            self._idle -= is_free
        if not is_free:
            threading.Thread(target=self._work, name="mimoflash-environment", daemon=True).start()
        self._calls.put(call)

    def _work(self) -> None:
        while True:
            self._calls.get()()
            with self._lock:
                self._idle += 1
