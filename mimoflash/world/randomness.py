"""Foreign games draw from the generators that all of Python shares: here each gets them for itself."""

import random
import threading
from types import TracebackType

import numpy as np

_lock = threading.RLock()  # one game at a time has them: others are played in other threads


class OwnRandomness:
    """Within `with`, Python's and numpy's global generators are the owner's, begun from `seed`; each `with` goes on
    where the last one ended. Outside of it they are everybody's and as they were.

    A game's draws are then a function of its seed, whatever game is played beside it, and disturb no other game's. One
    that hangs in here holds all others up.
    """

    def __init__(self, seed: int) -> None:
        self._own = random.Random(seed).getstate(), np.random.RandomState(seed % 2**32).get_state()

    def __enter__(self) -> None:
        _lock.acquire()
        self._others = random.getstate(), np.random.get_state()
        self._set(*self._own)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._own = random.getstate(), np.random.get_state()
        self._set(*self._others)
        _lock.release()

    @staticmethod
    def _set(of_python: tuple, of_numpy: tuple | dict) -> None:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
