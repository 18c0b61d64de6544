"""How much is taken in at a time: what is over it is told to come again."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from mimoflash.serve.errors import ApiError


class Gate:
    """At most `capacity` answers are under way, those that the engine runs and those that wait for it."""

    def __init__(self, capacity: int):
        self.capacity, self.taken = capacity, 0
        self._mean_seconds = 1.0  # of an answer, newer ones weigh more

    @contextmanager
    def room_for(self, answers: int) -> Iterator[None]:
        """Raises ApiError where there is none now, or never is."""
        if answers > self.capacity:
            raise ApiError(400, f"n is {answers}, but this server answers {self.capacity} at a time", param="n")
        if self.taken + answers > self.capacity:
            raise ApiError(
                429, f"the server is at its capacity of {self.capacity} answers at a time: try again later",
                code="server_busy", retry_after=max(1, round(self._mean_seconds / 2)),
            )
        self.taken += answers
        begin = time.monotonic()
        try:
            yield
        finally:
            self.taken -= answers
            self._mean_seconds += 0.1 * (time.monotonic() - begin - self._mean_seconds)
