"""The thread that steps for those who wait in event loops."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


class Driver:
    """Steps in a thread of its own, from `start` on until there is nothing to do.

    `step` is one step; `fail` ends all requests by the error that a step raised; `is_idle` says that there are none.
    """

    def __init__(self, step: Callable[[], object], fail: Callable[[BaseException], None], is_idle: Callable[[], bool]):
        self._step, self._fail, self._is_idle = step, fail, is_idle
        self._lock, self._is_running = threading.Lock(), False
        self._executor: ThreadPoolExecutor | None = None

    def start(self) -> None:
        """Sees to it that the thread steps. Raises RuntimeError after `close`."""
        with self._lock:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, thread_name_prefix="mimoflash-engine")
            if not self._is_running:
                self._executor.submit(self._run)
                self._is_running = True  # _run cannot say otherwise before the lock is free

    def close(self) -> None:
        """Waits until the thread has ended."""
        with self._lock:
            executor = self._executor
        if executor is not None:
            executor.shutdown()

    def _run(self) -> None:
        while True:
            try:
                self._step()
            except BaseException as error:  # whatever it is, requests that nobody moves on would hang
                self._end_all(error)
            with self._lock:
                if self._is_idle():
                    self._is_running = False
                    return

    def _end_all(self, error: BaseException) -> None:
        log = logging.getLogger(__name__)
        log.error("a pass of the model failed: its requests end", exc_info=error)
        try:
            self._fail(error)
        except BaseException:  # a sink's: each is called once more at most, so that this comes to an end
            log.exception("a request's sink failed as well")
