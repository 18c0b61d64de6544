"""The journal gives back what it was given, to the last bit, whenever the process was killed."""

import dataclasses
import struct

import numpy as np
import pytest
import torch
from fake_player import MODEL, FakePlayer, source
from hypothesis import given
from hypothesis import strategies as st

from mimoflash.posttrain.journal import Journal, Place
from mimoflash.posttrain.rollout import Rollout
from mimoflash.posttrain.scheduler import DataScheduler

floats = st.floats(allow_nan=False) | st.sampled_from([-0.0, 5e-324, -1.1, float("-inf")])
text = st.text(st.characters(), max_size=8)  # surrogates and line ends, too
shapes = st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 2))


@st.composite
def rollouts(draw):
    dtype = draw(st.sampled_from([torch.uint8, torch.int16, torch.int64]))
    routes = torch.randint(0, 100, draw(shapes), generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))
    return Rollout(
        draw(st.integers(0, 2**63)), [{"role": "user", "content": draw(text)}],
        [{"type": "function", "function": {"name": draw(text)}}], draw(st.lists(st.integers(0, 2**17), max_size=4)),
        draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=2)),
        draw(st.lists(floats, max_size=3)), draw(st.lists(floats, max_size=3)), routes.to(dtype), draw(floats),
        draw(st.booleans()), draw(st.dictionaries(text, floats | text | st.booleans() | st.none(), max_size=2)),
        draw(text), draw(st.tuples(st.integers(0, 9), st.integers(0, 9))),
    )


def bits(value):
    """What differs where a bit or a type does."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.numpy().tobytes()
    if dataclasses.is_dataclass(value):
        return {field.name: bits(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: bits(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value), [bits(each) for each in value]
    return type(value), struct.pack("d", value) if isinstance(value, float) else value


places = st.builds(Place, st.sampled_from(["a", "b c"]), st.integers(0, 3), st.integers(0, 3))
entries = st.dictionaries(places, rollouts(), max_size=4)


def written(tmp_path_factory, played):
    file = tmp_path_factory.mktemp("journal") / "states" / "rollouts.jsonl"
    journal = Journal(file)
    for place, rollout in played.items():
        journal.add(place, rollout)
    return file, journal


def found(journal, played):
    return {place for place, rollout in played.items() if (got := journal.find(place)) and bits(got) == bits(rollout)}


@given(entries)
def test_it_gives_back_every_bit(tmp_path_factory, played):
    file, journal = written(tmp_path_factory, played)
    assert found(journal, played) == set(played)  # also before it has been read again
    again = Journal(file)
    assert found(again, played) == set(played)
    assert again.find(Place("a", 9, 9)) is None


@given(entries, rollouts(), st.data())
def test_a_last_line_that_was_cut_off_is_lost_alone(tmp_path_factory, played, last, data):
    file, journal = written(tmp_path_factory, played)
    whole = file.read_bytes()
    journal.add(Place("last", 0, 0), last)
    line = file.read_bytes()[len(whole) :]
    cut = data.draw(st.integers(0, len(line)))
    file.write_bytes(whole + line[:cut])
    again = Journal(file)
    everything = played | {Place("last", 0, 0): last}
    assert found(again, everything) == set(everything if cut >= len(line) - 1 else played)  # but for its end of line
    more = Rollout(7)
    again.add(Place("more", 0, 0), more)  # a line of its own
    assert found(Journal(file), everything | {Place("more", 0, 0): more}) - {Place("last", 0, 0)} == {
        *played, Place("more", 0, 0)
    }


@given(entries, st.integers(0, 3))
def test_what_is_not_kept_is_forgotten_for_good(tmp_path_factory, played, number):
    file, journal = written(tmp_path_factory, played)
    journal.keep(lambda place: place.number == number)
    wanted = {place for place in played if place.number == number}
    assert found(journal, played) == wanted
    assert {place for place in played if journal.find(place)} == wanted
    later = Place("later", 5, 5)
    journal.add(later, Rollout(1))
    again = Journal(file)
    assert found(again, played) == wanted
    assert again.find(later) is not None
    assert [each.name for each in file.parent.iterdir()] == [file.name]


def test_of_two_with_the_same_place_the_later_one_counts(tmp_path):
    journal = Journal(tmp_path / "rollouts.jsonl")
    for reward in (1.0, 2.0):
        journal.add(Place("a", 0, 0), Rollout(1, reward=reward))
    assert Journal(tmp_path / "rollouts.jsonl").find(Place("a", 0, 0)).reward == 2.0


@pytest.mark.parametrize(
    ("info", "kept"),
    [
        ({"board": np.float32(0.5), "who": {1}}, {"board": "0.5", "who": "{1}"}),
        ({(1, 2): "place", "a": 1}, {"(1, 2)": "place", "a": "1"}),
    ],
)
def test_what_is_not_json_in_info_is_kept_as_its_text(tmp_path, info, kept):
    journal = Journal(tmp_path / "rollouts.jsonl")
    journal.add(Place("a", 0, 0), Rollout(1, info=info))
    assert journal.find(Place("a", 0, 0)).info == kept


def test_what_has_itself_inside_does_not_end_training(tmp_path):
    info = {}
    info["self"] = info
    journal = Journal(tmp_path / "rollouts.jsonl")
    journal.add(Place("a", 0, 0), Rollout(1, info=info))
    assert set(journal.find(Place("a", 0, 0)).info) == {"self"}


def test_rollouts_that_finish_while_it_forgets_stay(tmp_path):
    """Steps are saved while others are played: nothing that has finished is lost in between."""
    file, steps = tmp_path / "rollouts.jsonl", 30
    player = FakePlayer(longest=0.002)
    scheduler = DataScheduler(
        player, {"go": source(groups=4)}, steps=steps, group_size=4, seed=0, max_staleness=3, journal=Journal(file)
    )
    with scheduler:
        scheduler.begin(MODEL)
        for _ in range(steps):
            scheduler.take()
            scheduler.update(MODEL)
            for _ in range(5):
                scheduler.forget_taken()
    assert len(player.finished) == steps * 16
    assert Journal(file)._lines == {}  # all have been taken


def test_what_a_later_step_has_not_had_is_kept(tmp_path):
    """Groups that the saved state has not begun, by a process that came further: they are there to be taken."""
    file = tmp_path / "rollouts.jsonl"
    journal = Journal(file)
    for number in range(6):
        journal.add(Place("go", number, 0), Rollout(number, info={"sampled_by": [9]}))
    player = FakePlayer()
    scheduler = DataScheduler(player, {"go": source()}, steps=3, group_size=1, seed=0, journal=journal)
    with scheduler:
        scheduler.begin(MODEL)
        for step in range(3):
            assert [group[0].seed for group in scheduler.take()["go"]] == [2 * step, 2 * step + 1]
            scheduler.update(MODEL)
            scheduler.forget_taken()
            assert {place.number for place in Journal(file)._lines} == set(range(2 * step + 2, 6))
    assert player.begun == []
