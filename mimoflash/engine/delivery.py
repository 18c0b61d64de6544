"""Events on their way from the thread that steps to the event loops that wait for them."""

import asyncio
import weakref
from collections import deque

from mimoflash.engine.request import Event


class Delivery:
    """One event loop's: what several requests get in a step wakes the loop once."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = weakref.ref(loop)  # not to keep it alive: the engine has a Delivery as long as there is the loop
        self._sent: deque[tuple[asyncio.Queue[Event], Event]] = deque()
        self._is_called = False

    def send(self, queue: asyncio.Queue[Event], event: Event) -> None:
        """From any thread. What comes after its loop has closed is dropped."""
        loop = self._loop()
        if loop is None or loop.is_closed():
            self._sent.clear()
            return
        self._sent.append((queue, event))
        if not self._is_called:
            try:
                self._is_called = True
                loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # closed this moment
                self._sent.clear()
            except BaseException:  # an interrupt: the loop may not have been called, and once more does no harm
                self._is_called = False
                raise

    def _deliver(self) -> None:
        self._is_called = False  # before the queue is emptied: what comes from now on calls again
        while self._sent:
            queue, event = self._sent.popleft()
            queue.put_nowait(event)
