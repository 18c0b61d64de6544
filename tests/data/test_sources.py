"""Sources: small real files of each kind, and bad rows that are named by file and row."""

import json
import sysconfig
from itertools import pairwise
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimoflash.data.sources import Document, DomainSource, FolderSource, StdlibSource, cut, read_documents
from mimoflash.world import domain, task_id

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"x": {}}}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": None}}}
CHAT = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]


def read(path, **options) -> list[Document]:
    return list(read_documents(FolderSource("s", str(path), **options)))


def test_a_folder_of_everything_in_the_order_of_paths(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "code.py").write_text("x = 1\n")
    (tmp_path / "a.txt").write_text("Grüße", encoding="utf-8")
    (tmp_path / "c.jsonl").write_text(
        json.dumps({"text": "row"}) + "\n\n" + json.dumps({"messages": CHAT, "tools": [TOOL]})
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": ["p", "q"], "n": [1, 2]}), tmp_path / "d.parquet")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    (tmp_path / "zeros.bin").write_bytes(bytes(100))
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    documents = read(tmp_path)
    assert [d.text for d in documents] == ["Grüße", "x = 1\n", "row", None, "p", "q"]
    assert (documents[3].messages, documents[3].tools) == (CHAT, [TOOL])  # the argument that is null stays null
    assert documents[3].where == f"{tmp_path / 'c.jsonl'}:3"
    assert {d.source for d in documents} == {"s"}


def test_questions_and_answers_by_field_name(tmp_path):
    (tmp_path / "gsm.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}))
    (document,) = read(tmp_path / "gsm.jsonl", prompt_field="question", answer_field="answer")
    assert document.messages == [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "#### 2"}]
    (document,) = read(tmp_path / "gsm.jsonl", text_field="question")
    assert document.text == "1 + 1?"
    with pytest.raises(ValueError, match="go together"):
        FolderSource("s", str(tmp_path), prompt_field="question")


def test_conversations_in_parquet_lose_the_nulls_of_their_columns(tmp_path):
    rows = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho", "reasoning_content": "hm"}]]
    pyarrow.parquet.write_table(pyarrow.table({"messages": rows, "text": [None]}), tmp_path / "x.parquet")
    assert [d.messages for d in read(tmp_path)] == rows


GOOD = json.dumps({"text": "good"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "JSON"),
        ("[1]", "must be an object"),
        ('{"txt": "x"}', r"'text' is missing \(the row has \['txt'\]\)"),
        ('{"text": 3}', "'text' is not a string"),
        ('{"messages": "x"}', "list of objects"),
        ('{"messages": [{"role": "usr", "content": "x"}]}', "role 'usr'"),
        ('{"messages": [{"role": "user", "content": 3}]}', "content must be a string"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "nothing to learn"),
        (json.dumps({"messages": CHAT, "tools": "x"}), "'tools' must be"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path, row, message):
    (tmp_path / "x.jsonl").write_text(f"{GOOD}\n{row}\n{GOOD}\n")
    with pytest.raises(ValueError, match=rf"x\.jsonl:2: .*{message}"):
        read(tmp_path)


def test_other_bad_files(tmp_path):
    with pytest.raises(ValueError, match="no files at"):
        read(tmp_path / "nowhere")
    (tmp_path / "x.jsonl").write_bytes(GOOD.encode() + b'\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:2.*UTF-8"):
        read(tmp_path / "x.jsonl")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no, not really PAR1")
    with pytest.raises(ValueError, match=r"x\.parquet: cannot be read as Parquet after row 0"):
        read(tmp_path / "x.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "y.parquet")
    with pytest.raises(ValueError, match=r"y\.parquet:2: field 'text' is missing"):
        read(tmp_path / "y.parquet")


@given(st.text("ab\n", max_size=200), st.integers(1, 30))
def test_cut_loses_nothing_and_prefers_blank_lines(text, limit):
    parts = cut(text, limit)
    assert "".join(parts) == text
    assert all(0 < len(part) <= limit + 2 for part in parts)
    for part, after in pairwise(parts):
        whole = part + after
        half = whole[limit // 2 : limit]
        if "\n\n" in half:
            assert part.endswith("\n\n")
        elif "\n" in half:
            assert part.endswith("\n")
        else:
            assert len(part) == limit


def test_only_the_last_part_of_a_text_is_complete(tmp_path):
    (tmp_path / "x.txt").write_text("one\n\ntwo\n\nthree\n\n")
    documents = read(tmp_path, document_characters=6)
    assert [(d.text, d.complete) for d in documents] == [
        ("one\n\n", False),
        ("two\n\n", False),
        ("three\n", False),
        ("\n", True),
    ]


def test_the_standard_library_is_real_code_up_to_a_cap():
    documents = list(read_documents(StdlibSource(max_bytes=300_000)))
    total = sum(len(d.text.encode()) for d in documents)
    assert 280_000 < total <= 300_000
    assert documents == list(read_documents(StdlibSource(max_bytes=300_000)))
    root = Path(sysconfig.get_paths()["stdlib"])
    places = [Path(d.where).relative_to(root) for d in documents]
    assert not any({"site-packages", "test", "tests"} & set(place.parts) for place in places)
    assert len({place.parts[0][0] for place in places}) > 3  # from all over the alphabet
    first = documents[0].where
    assert "".join(d.text for d in documents if d.where == first) == Path(first).read_text("utf-8")


def test_domains_are_demonstrated_by_seed_with_and_without_reasoning():
    source = DomainSource("sums", "arithmetic", 20, options={"digits": [2]})
    documents = list(read_documents(source))
    expected = [domain("arithmetic", digits=[2]).demonstration(seed) for seed in range(20)]
    assert [d.messages for d in documents] == [d.messages for d in expected]
    bare = list(read_documents(DomainSource("sums", "arithmetic", 20, options={"digits": [2]}, style="non_thinking")))
    assert [d.messages for d in bare] == [d.without_reasoning().messages for d in expected]
    hasty = list(read_documents(DomainSource("sums", "arithmetic", 20, options={"digits": [2]}, style="hasty")))
    assert [d.messages for d in hasty] == [d.hasty().messages for d in expected]
    assert any("reasoning_content" in m for d in documents for m in d.messages)
    with pytest.raises(ValueError, match="style is 'slow'; there are thinking, non_thinking, hasty"):
        DomainSource("sums", "arithmetic", 20, style="slow")
    with pytest.raises(ValueError, match="there is no domain"):
        list(read_documents(DomainSource("x", "alchemy", 1)))


def test_identity_of_a_conversation_is_its_task():
    def chat(system, question, answer):
        messages = [{"role": "system", "content": system}] if system else []
        return Document(
            "s",
            "here",
            messages=[*messages, {"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        )

    assert chat(None, "q", "a").identity == chat("be brief", "q", "b").identity != chat(None, "p", "a").identity
    assert chat(None, "q", "a").identity == int(task_id([{"role": "user", "content": "q"}])[:16], 16)
    greeting = [Document("s", "", messages=[{"role": "assistant", "content": text}]) for text in ("hello", "good day")]
    assert greeting[0].identity != greeting[1].identity
