"""Sources: where documents come from. One dataclass and one function a kind; `read_documents` picks by kind.

- folder: files of text or code, JSONL and Parquet files with a text or a conversation in each row
- stdlib: the Python standard library of this machine, real code that is always at hand
- domain: demonstrations of a domain of `mimoflash.world`, generated and verifiable
"""

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow
import pyarrow.parquet

from mimoflash.data.dedup import identity_hash
from mimoflash.world import domain, task_id

_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Document:
    """A plain text (`text`) or a conversation (`messages` and `tools`, in OpenAI's form) of the named source.

    `where` it stands (file:row, or the domain's seed) is for messages. `complete` is False for a part of a text that
    goes on: it is not followed by an end-of-text token.
    """

    source: str
    where: str
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    complete: bool = True

    @property
    def content(self) -> str:
        """All of it as one string, to find duplicates by."""
        return self.text if self.text is not None else json.dumps([self.messages, self.tools], ensure_ascii=False)

    @property
    def identity(self) -> int:
        """Unsigned 64-bit hash of what must not be in both splits: a text as a whole, of a conversation the task it
        answers.
        """
        if self.messages is None:
            return identity_hash(self.content)
        asked = self.messages[: [m["role"] for m in self.messages].index("assistant")]
        if not any(message["role"] == "user" for message in asked):
            return identity_hash(self.content)
        return int(task_id(asked)[:16], 16)


@dataclass(frozen=True)
class FolderSource:
    """A file, or all files under a folder: `.jsonl` and `.parquet` by row, everything else that is UTF-8 as text.

    A row is a conversation if `prompt_field` and `answer_field` are given (e.g. question and answer) or if it has
    `messages` (and perhaps `tools`); else its `text_field` is a text. Files of text are cut at blank lines into
    documents of at most `document_characters`. Hidden files are left out. Reading stops before `max_bytes` of text.
    """

    name: str
    path: str
    kind: Literal["folder"] = "folder"
    text_field: str = "text"
    prompt_field: str | None = None
    answer_field: str | None = None
    document_characters: int = 8192
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        if (self.prompt_field is None) != (self.answer_field is None):
            raise ValueError(f"source {self.name!r}: prompt_field and answer_field go together, give both or neither")
        _check_positive(self, "document_characters", "max_bytes")


@dataclass(frozen=True)
class StdlibSource:
    """The .py files of Python's standard library (without its tests), in an order by hash: a cap takes a sample."""

    name: str = "stdlib"
    kind: Literal["stdlib"] = "stdlib"
    include_tests: bool = False
    document_characters: int = 8192
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        _check_positive(self, "document_characters", "max_bytes")


Style = Literal["thinking", "non_thinking", "hasty"]


@dataclass(frozen=True)
class DomainSource:
    """The demonstrations of seeds 0 .. count of a domain; the world decides which tasks are held out (about a tenth).

    `style`: "thinking" has the reasoning; "non_thinking" has none, for when thinking is off; "hasty" gives the last
    answer at once although thinking is on, as people do, which a teacher may unlearn.
    """

    name: str
    domain: str
    count: int
    kind: Literal["domain"] = "domain"
    options: Mapping[str, Any] = field(default_factory=dict)
    style: Style = "thinking"

    def __post_init__(self) -> None:
        _check_positive(self, "count")
        if self.style not in get_args(Style):
            raise ValueError(f"source {self.name!r}: style is {self.style!r}; there are {', '.join(get_args(Style))}")


def _check_positive(source: "Source", *names: str) -> None:
    for name in names:
        value = getattr(source, name)
        if value is not None and value < 1:
            raise ValueError(f"source {source.name!r}: {name} is {value}; 1 or more is needed")


Source = FolderSource | StdlibSource | DomainSource


def read_documents(source: Source) -> Iterator[Document]:
    """The documents of a source, always in the same order. Raises ValueError where one cannot be read, with file and
    row.
    """
    if isinstance(source, DomainSource):
        return domain_documents(source, range(source.count))
    documents = folder_documents(source) if isinstance(source, FolderSource) else stdlib_documents(source)
    return _capped(documents, source.max_bytes)


def folder_documents(source: FolderSource) -> Iterator[Document]:
    """The documents of a folder's files in the order of their paths."""
    for path in source_files(source):
        if path.suffix == ".jsonl":
            rows = _jsonl_rows(path)
        elif path.suffix == ".parquet":
            rows = _parquet_rows(path)
        else:
            yield from _text_documents(source, path)
            continue
        for where, row in rows:
            yield _row_document(source, where, row)


def stdlib_documents(source: StdlibSource) -> Iterator[Document]:
    """The documents of the standard library's modules."""
    for path in source_files(source):
        yield from _text_documents(source, path)


def domain_documents(source: DomainSource, seeds: Sequence[int]) -> Iterator[Document]:
    """The demonstrations of these seeds: a function of the seed, so that processes can share them out."""
    tasks = domain(source.domain, **source.options)
    for seed in seeds:
        demonstration = tasks.demonstration(seed)
        if source.style == "non_thinking":
            demonstration = demonstration.without_reasoning()
        elif source.style == "hasty":
            demonstration = demonstration.hasty()
        yield Document(
            source.name, f"{source.domain}, seed {seed}", messages=demonstration.messages, tools=demonstration.tools
        )


def source_files(source: FolderSource | StdlibSource) -> list[Path]:
    """The files that a source reads, in order. Raises ValueError if there are none."""
    if isinstance(source, StdlibSource):
        root = Path(sysconfig.get_paths()["stdlib"])
        left_out = {"site-packages", "dist-packages", "__pycache__"}
        if not source.include_tests:
            left_out |= {"test", "tests", "idle_test"}
        names = [name for name in _walk(root, left_out) if name.suffix == ".py"]
        names.sort(key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())
        return [root / name for name in names]
    root = Path(source.path)
    files = [root] if root.is_file() else [root / name for name in sorted(_walk(root, set()))]
    if not files:
        raise ValueError(f"source {source.name!r}: there are no files at {source.path}")
    return files


def _walk(root: Path, left_out: set[str]) -> Iterator[Path]:
    """The paths of the files under root, relative to it, without hidden ones and those in folders with these names."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in left_out and not name.startswith(".")]
        yield from (Path(folder, name).relative_to(root) for name in names if not name.startswith("."))


def _text_documents(source: FolderSource | StdlibSource, path: Path) -> Iterator[Document]:
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError:
        return  # not text: a picture, an archive, another encoding
    if "\0" not in text:
        parts = cut(text, source.document_characters)
        yield from (Document(source.name, str(path), text=part, complete=part is parts[-1]) for part in parts)


def cut(text: str, limit: int) -> list[str]:
    """The text in parts of at most `limit` characters, cut at the last blank line or else the last line of a part's
    second half.
    """
    parts, start = [], 0
    while start < len(text):
        end = start + limit
        if end < len(text):
            for boundary in ("\n\n", "\n"):
                found = text.rfind(boundary, start + limit // 2, end)
                if found >= 0:
                    end = found + len(boundary)
                    break
        parts.append(text[start:end])
        start = end
    return parts


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield f"{path}:{number}", json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}:{number}: not a line of JSON in UTF-8 ({error})") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", _without_nulls(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet after row {number} ({error})") from None


def _without_nulls(value: Any) -> Any:
    """Parquet gives every row all fields of the column's type, null where the row has none."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _row_document(source: FolderSource, where: str, row: Any) -> Document:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row must be an object, not {type(row).__name__}")
    if source.prompt_field is not None and source.answer_field is not None:
        prompt, answer = _string(where, row, source.prompt_field), _string(where, row, source.answer_field)
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        return Document(source.name, where, messages=messages, tools=[])
    if row.get("messages") is not None:
        messages, tools = row["messages"], row.get("tools") or []
        _check_messages(where, messages)
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise ValueError(f"{where}: 'tools' must be a list of objects")
        return Document(source.name, where, messages=messages, tools=tools)
    return Document(source.name, where, text=_string(where, row, source.text_field))


def _string(where: str, row: dict[str, Any], name: str) -> str:
    if not isinstance(row.get(name), str):
        what = "is not a string" if name in row else f"is missing (the row has {sorted(row)})"
        raise ValueError(f"{where}: field {name!r} {what}; name the right field in the source's options")
    return row[name]


def _check_messages(where: str, messages: Any) -> None:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"{where}: 'messages' must be a list of objects")
    for message in messages:
        if message.get("role") not in _ROLES:
            raise ValueError(
                f"{where}: a message has role {message.get('role')!r}; it must be one of {', '.join(_ROLES)}"
            )
        if not isinstance(message.get("content"), str | None):
            raise ValueError(f"{where}: a message's content must be a string")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{where}: a conversation without a message of the assistant has nothing to learn from")


def _capped(documents: Iterator[Document], max_bytes: int | None) -> Iterator[Document]:
    if max_bytes is None:
        yield from documents
        return
    total = 0
    for document in documents:
        total += len(document.content.encode("utf-8", "surrogatepass"))
        if total > max_bytes:
            return
        yield document
