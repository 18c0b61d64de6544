"""Preparing: what ends up in the shards, when it is made again, and that a planted leak is found."""

import json
import random

import numpy as np
import pytest

from mimoflash.data import DomainSource, FolderSource, PackedLoader, ShardWriter, check_no_leak, open_prepared, prepare
from mimoflash.data.shards import ShardReader
from mimoflash.text import encode_training_chat, train_tokenizer
from mimoflash.world import domain, is_held_out

SUMS = DomainSource("sums", "arithmetic", 400, options={"digits": [1, 2]})


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["What is 12 + 34? A few words to learn pairs from.\n" * 50], 320)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """400 different texts, ten of them twice, one of them with a word changed, and one of white space."""
    rng, folder = random.Random(0), tmp_path_factory.mktemp("texts")
    texts = [" ".join(f"w{rng.randrange(300)}" for _ in range(60)) for _ in range(400)]
    rows = [*texts, *(text.replace(" ", "\n") for text in texts[:10]), texts[20] + " more", " \n "]
    (folder / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return folder


@pytest.fixture(scope="module")
def prepared(tokenizer, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "deep" / "data"
    return prepare([FolderSource("texts", str(folder)), SUMS], tokenizer, out, held_out=0.1)


def documents_of(shard: ShardReader) -> list[list[int]]:
    return [shard.document(i)[0].tolist() for i in range(len(shard))]


def test_texts_are_there_once_ended_and_split_by_hash(prepared, tokenizer, folder):
    train, held_out = prepared.train["texts"], prepared.held_out["texts"]
    rows = [json.loads(line)["text"] for line in (folder / "x.jsonl").read_text().splitlines()][:400]
    expected = [[*tokenizer.encode(text), tokenizer.special.end_of_text] for text in rows]
    assert sorted(documents_of(train) + documents_of(held_out)) == sorted(expected)
    assert train.mask.all()
    assert not train.conversation.any()
    assert 15 < len(held_out) < 80
    counts = prepared.manifest["sources"]["texts"]
    assert (counts["duplicates"], counts["near_duplicates"], counts["empty"]) == (10, 1, 1)
    assert (counts["train"], counts["train_tokens"]) == (len(train), len(train.tokens))


def test_end_of_text_follows_a_text_not_its_parts(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("first part\n\nsecond part\n\n")
    source = FolderSource("a", str(tmp_path / "a.txt"), document_characters=14)
    first, second = documents_of(prepare([source], tokenizer, tmp_path / "out", held_out=0).train["a"])
    assert first == tokenizer.encode("first part\n\n")
    assert second == [*tokenizer.encode("second part\n\n"), tokenizer.special.end_of_text]


def test_domains_are_split_by_the_world_and_masked_by_the_chat(prepared, tokenizer):
    demonstrations = [domain("arithmetic", digits=[1, 2]).demonstration(seed) for seed in range(400)]
    for shard, split in ((prepared.train["sums"], False), (prepared.held_out["sums"], True)):
        expected = {
            tuple(zip(*encode_training_chat(tokenizer, d.messages, d.tools), strict=True))
            for d in demonstrations
            if is_held_out(d.messages) == split
        }
        documents = [shard.document(i) for i in range(len(shard))]
        assert {tuple(zip(tokens.tolist(), mask.tolist(), strict=True)) for tokens, mask in documents} == expected
        assert len(documents) == len(expected)  # a task that two seeds share is there once
        assert shard.conversation.all()
    assert prepared.manifest["sources"]["sums"]["near_duplicates"] == 0  # "12 + 34?" and "12 + 35?" are two tasks


def test_who_could_have_thought_writes_that_it_has_not(tokenizer, tmp_path):
    """Where thinking is off, the empty tags stand in the prompt."""
    styles = ("thinking", "non_thinking", "hasty")
    sources = [DomainSource(style, "arithmetic", 30, options={"digits": [2]}, style=style) for style in styles]
    data = prepare(sources, tokenizer, tmp_path / "data", held_out=0.1)
    special = tokenizer.special
    for style, shard in data.train.items():
        for document in range(len(shard)):
            tokens, mask = shard.document(document)
            own = tokens[mask].tolist()
            begins = {"thinking": [special.think], "hasty": [special.think, special.end_think]}.get(style, [])
            assert own[: len(begins)] == begins
            assert (special.end_think in own) == (style != "non_thinking")


def test_what_was_prepared_loads(prepared):
    loader = PackedLoader(prepared.train, {"texts": 1, "sums": 1}, 512, prompt_weight=0.2)
    batch = loader.batch(0, 8)
    assert set(batch.loss_weight.unique().tolist()) == {0.0, float(np.float32(0.2)), 1.0}
    assert loader.packing["sums"].padding < 0.03


def test_two_processes_make_the_same_files(prepared, tokenizer, folder, tmp_path):
    again = prepare([FolderSource("texts", str(folder)), SUMS], tokenizer, tmp_path / "d", held_out=0.1, workers=2)
    for name in ("texts", "sums"):
        assert again.train[name].path.read_bytes() == prepared.train[name].path.read_bytes()
        assert again.held_out[name].path.read_bytes() == prepared.held_out[name].path.read_bytes()
    assert again.manifest == prepared.manifest


def test_data_is_prepared_again_only_when_something_changed(tokenizer, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.txt").write_text("some text of some words")
    folder = tmp_path / "out"

    def made(sources, tokenizer=tokenizer, **options) -> bool:
        before = (folder / "manifest.json").stat().st_ino if folder.exists() else None
        prepare(sources, tokenizer, folder, held_out=0, **options)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]  # nothing is left over
        return (folder / "manifest.json").stat().st_ino != before

    texts = FolderSource("texts", str(source))
    assert made([texts])
    assert not made([texts])
    assert made([texts, DomainSource("sums", "arithmetic", 5)])
    assert not made([texts, DomainSource("sums", "arithmetic", 5)])
    assert made([texts, DomainSource("sums", "arithmetic", 6)])
    assert made([texts])
    (source / "a.txt").write_text("some other text with words")
    assert made([texts])
    assert made([texts], near_duplicates=0.9)
    assert made([texts], tokenizer=train_tokenizer(["other words, other pairs " * 50], 300))
    (folder / "manifest.json").write_text("{")
    assert made([texts])


def test_a_failure_leaves_the_folder_as_it_was(tokenizer, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "good row"}\n')
    source = FolderSource("rows", str(tmp_path / "in.jsonl"))
    before = prepare([source], tokenizer, tmp_path / "out", held_out=0).train["rows"].path.read_bytes()
    (tmp_path / "in.jsonl").write_text('{"text": "good row"}\n{"text": 5}\n')
    with pytest.raises(ValueError, match=r"in\.jsonl:2"):
        prepare([source], tokenizer, tmp_path / "out", held_out=0)
    assert (tmp_path / "out" / "rows.train.shard").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out"]


def test_a_conversation_that_cannot_be_rendered_is_named(tokenizer, tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": "not JSON"}}
    rows = [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]}]
    (tmp_path / "in.jsonl").write_text(json.dumps(rows[0]))
    with pytest.raises(ValueError, match=r"in\.jsonl:1: .*not a JSON object"):
        prepare([FolderSource("rows", str(tmp_path / "in.jsonl"))], tokenizer, tmp_path / "out")


def test_a_foreign_folder_is_not_replaced_and_arguments_are_checked(tokenizer, folder, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    texts = FolderSource("texts", str(folder))
    with pytest.raises(ValueError, match="choose another folder"):
        prepare([texts], tokenizer, tmp_path)
    with pytest.raises(ValueError, match="a name of its own"):
        prepare([texts, texts], tokenizer, tmp_path / "out")
    with pytest.raises(ValueError, match=r"'\.\./x' becomes a file's name"):
        prepare([FolderSource("../x", str(folder))], tokenizer, tmp_path / "out")
    with pytest.raises(ValueError, match="fraction"):
        prepare([texts], tokenizer, tmp_path / "out", held_out=2)
    with pytest.raises(ValueError, match="no document to train on"):
        prepare([FolderSource("empty", str(tmp_path / "precious.txt"), max_bytes=1)], tokenizer, tmp_path / "out")


def test_damage_is_noticed_on_opening(tokenizer, tmp_path):
    shard = prepare([SUMS], tokenizer, tmp_path / "out").train["sums"].path
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"sums\.train\.shard: its checksum"):
        prepare([SUMS], tokenizer, tmp_path / "out")
    shard.unlink()
    with pytest.raises(ValueError, match=r"sums\.train\.shard: it is missing"):
        open_prepared(tmp_path / "out")
    with pytest.raises(ValueError, match="not a folder of prepared data"):
        open_prepared(tmp_path / "elsewhere")


def test_a_planted_leak_is_found(prepared, tmp_path):
    held_out = {name: shard.identities for name, shard in prepared.held_out.items()}
    check_no_leak(prepared.train, held_out)
    with ShardWriter(tmp_path / "planted", 320) as writer:
        for identity in [1, 2, *held_out["sums"][:3].tolist()]:
            writer.add(np.array([1, 2]), np.ones(2, bool), identity=identity, conversation=True)
    with pytest.raises(ValueError, match=r"'planted': 3 of 5 training documents are held out in 'sums'"):
        check_no_leak({**prepared.train, "planted": ShardReader(tmp_path / "planted")}, held_out)


def test_held_out_tasks_cannot_come_in_by_a_file(tokenizer, tmp_path):
    demonstrations = [domain("arithmetic", digits=[1, 2]).demonstration(seed).messages for seed in range(100)]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in demonstrations))
    with pytest.raises(ValueError, match=r"'rollouts': \d+ of \d+ training documents are held out in 'sums'"):
        prepare([FolderSource("rollouts", str(tmp_path / "rollouts.jsonl")), SUMS], tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
