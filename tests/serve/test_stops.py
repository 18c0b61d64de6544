"""Stop strings, for any cut of the text."""

from hypothesis import example, given
from hypothesis import strategies as st

from mimoflash.serve.stops import StopTrimmer

TEXT = st.text("ab\n", max_size=30)


@example(text="abc", stops=["abc", "b"], data=None)
@given(text=TEXT, stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3), data=st.data())
def test_text_goes_through_up_to_the_first_stop_string(text, stops, data):
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    places = [place for _, place in sorted(ends)[:1]]  # of the first that is complete
    trimmer, pieces, rest = StopTrimmer(stops), [], text
    while rest:
        size = data.draw(st.integers(1, len(rest))) if data else 3
        pieces.append(trimmer.feed(rest[:size]))
        rest = rest[size:]
        shown = "".join(pieces)
        assert text[: min(places, default=len(text))].startswith(shown)
        if not places:  # nothing waits that cannot become a stop string
            read = text[: len(text) - len(rest)]
            assert any(stop.startswith(read[len(shown) :]) for stop in [*stops, ""] if stop or read == shown)
    assert "".join(pieces) + trimmer.finish() == text[: min(places, default=len(text))]
    assert (trimmer.found in stops) if places else trimmer.found is None
