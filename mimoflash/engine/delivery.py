"""Events on their way from the thread that steps to the event loops that wait for them."""

import asyncio
import weakref
from collections import deque

from mimoflash.engine.request import Event, Output


class Delivery:
    """One event loop's: what several requests get in a step wakes the loop once. With `gather` it is woken once in so
    many seconds, for all of them; what comes after a silence does not wait, nor a request's first tokens and its end.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, gather: float = 0.0):
        self._loop = weakref.ref(loop)  # not to keep it alive: the engine has a Delivery as long as there is the loop
        self._gather = gather
        self._sent: deque[tuple[asyncio.Queue[Event], Event]] = deque()
        self._is_called = False  # it is going to look, now or when the moment is over
        self._due = 0.0  # when that is, in the loop's time

    def send(self, queue: asyncio.Queue[Event], event: Event) -> None:
        """From any thread. What comes after its loop has closed is dropped."""
        loop = self._loop()
        if loop is None or loop.is_closed():
            self._sent.clear()
            return
        self._sent.append((queue, event))
        is_urgent = isinstance(event, Output) or event.start == 0
        if not self._is_called or (is_urgent and self._due):
            try:
                self._is_called = True
                loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # closed this moment
                self._sent.clear()
            except BaseException:  # an interrupt: the loop may not have been called, and once more does no harm
                self._is_called = False
                raise

    def _deliver(self, due: float = 0.0) -> None:
        """`due`: when this was to be, where a moment has passed."""
        try:
            if due and due != self._due:
                return  # since then it was called for something urgent: another moment has begun
            if not due and self._due and not self._sent:
                return  # several were urgent, and the first call has had them all
            loop = self._loop()
            assert loop is not None, "it is what runs this"
            self._due = loop.time() + self._gather if self._gather and self._sent else 0.0
            if self._due:
                loop.call_at(self._due, self._deliver, self._due)
            else:
                self._is_called = False  # before the queue is emptied: what comes from now on calls again
        except BaseException:  # an interrupt: the next event calls again
            self._due, self._is_called = 0.0, False
            raise
        while self._sent:
            queue, event = self._sent.popleft()
            queue.put_nowait(event)
