"""Stop strings, kept out of what a client gets."""

from collections.abc import Sequence


class StopTrimmer:
    """Lets text through up to the first stop string; what may become one waits until that is known. `found`: the stop
    string that came."""

    def __init__(self, stops: Sequence[str]):
        self._stops, self._held = tuple(stops), ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
        if not self._stops or self.found is not None:
            return "" if self.found is not None else text
        self._held += text
        found = [(place + len(stop), place, stop) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            _, place, self.found = min(found)  # the first that is complete, however the text was cut
            text, self._held = self._held[:place], ""
            return text
        keep = max(_overlap(self._held, stop) for stop in self._stops)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text

    def finish(self) -> str:
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
