"""Responses kept for later, in a SQLite database: a file, or memory."""

import asyncio
import json
import sqlite3
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

MEMORY = ":memory:"
_OURS, _VERSION = 0x4D694D6F, 1  # SQLite's header says whose a database is, and in which form
_TABLES = (
    """CREATE TABLE responses (
        number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, bytes INTEGER NOT NULL, response TEXT NOT NULL,
        conversation TEXT NOT NULL
    )""",
    """CREATE TABLE items (
        id TEXT PRIMARY KEY, number INTEGER NOT NULL REFERENCES responses ON DELETE CASCADE, item TEXT NOT NULL
    )""",
    "CREATE INDEX items_of_response ON items (number)",
)
# the newest one stays, whatever its size: its client has just been told its id
_DROP_OLDEST = """
    DELETE FROM responses WHERE number IN (
        SELECT number FROM (
            SELECT number, row_number() OVER newer AS place, sum(bytes) OVER newer AS total
            FROM responses WINDOW newer AS (ORDER BY number DESC)
        ) WHERE place > 1 AND (place > ? OR total > ?)
    )"""

Item = Mapping[str, Any]
Found = TypeVar("Found")


class StoreError(ValueError):
    """A database that cannot be used."""


@dataclass(frozen=True)
class Stored:
    """A response, and all items that it answered, those of earlier responses included."""

    response: dict[str, Any]
    conversation: list[dict[str, Any]]


class Store:
    """Keeps the newest `most` responses, of no more than `most_bytes` together. Everything happens in one thread with
    one connection. Raises StoreError for a file that is something else, and where the database fails."""

    def __init__(self, path: str = MEMORY, *, most: int = 1000, most_bytes: int = 2**28):
        self._path, self._most, self._most_bytes = path, most, most_bytes
        self._thread = ThreadPoolExecutor(1, "store")
        try:
            self._db = self._thread.submit(_open, path).result()
        except StoreError:
            self._thread.shutdown()
            raise

    async def put(self, response: Mapping[str, Any], conversation: Sequence[Item], named: Collection[str] = ()) -> None:
        """`named`: the ids by which items of the conversation and the response's output can be asked for."""
        await self._run(lambda: self._put(response, conversation, named))

    async def get(self, id: str) -> Stored | None:
        return await self._run(lambda: self._get(id))

    async def item(self, id: str) -> dict[str, Any] | None:
        return await self._run(lambda: self._item(id))

    async def delete(self, id: str) -> bool:
        """Whether it was there. Responses that went on from it keep the conversation."""
        return await self._run(lambda: self._delete(id))

    async def close(self) -> None:
        await self._run(self._db.close)
        self._thread.shutdown()

    async def _run(self, work: Callable[[], Found]) -> Found:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except sqlite3.Error as error:
            raise StoreError(f"the store {self._path}: {error}") from error

    def _put(self, response: Mapping[str, Any], conversation: Sequence[Item], named: Collection[str]) -> None:
        texts = json.dumps(response), json.dumps(conversation)
        items = [(each["id"], json.dumps(each)) for each in (*conversation, *response["output"]) if each["id"] in named]
        row = (response["id"], sum(map(len, texts)) + sum(len(text) for _, text in items), *texts)
        with self._db as db:
            added = db.execute("INSERT INTO responses (id, bytes, response, conversation) VALUES (?, ?, ?, ?)", row)
            db.executemany(f"INSERT OR IGNORE INTO items VALUES (?, {added.lastrowid}, ?)", items)
            db.execute(_DROP_OLDEST, (self._most, self._most_bytes))

    def _get(self, id: str) -> Stored | None:
        row = self._db.execute("SELECT response, conversation FROM responses WHERE id = ?", (id,)).fetchone()
        return Stored(json.loads(row[0]), json.loads(row[1])) if row else None

    def _item(self, id: str) -> dict[str, Any] | None:
        row = self._db.execute("SELECT item FROM items WHERE id = ?", (id,)).fetchone()
        return json.loads(row[0]) if row else None

    def _delete(self, id: str) -> bool:
        with self._db as db:
            return db.execute("DELETE FROM responses WHERE id = ?", (id,)).rowcount > 0


def _open(path: str) -> sqlite3.Connection:
    try:
        if path != MEMORY:
            Path(path).touch(mode=0o600)  # conversations are nobody else's
        db = sqlite3.connect(path, check_same_thread=False)
    except (sqlite3.Error, OSError) as error:
        raise StoreError(f"the store {path} cannot be opened: {error}") from error
    try:
        _prepare(db)
        return db
    except (sqlite3.Error, StoreError) as error:
        with suppress(sqlite3.Error):
            db.close()
        reason = f"the store {path} cannot be used: {error}; give another path, or move that file away"
        raise StoreError(reason) from error


def _prepare(db: sqlite3.Connection) -> None:
    """What is not ours is left as it is."""
    with db:
        db.execute("BEGIN IMMEDIATE")  # another server may be opening it too
        (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        (owner,) = db.execute("PRAGMA application_id").fetchone()
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if not tables and not owner and not version:
            for statement in (*_TABLES, f"PRAGMA application_id = {_OURS}", f"PRAGMA user_version = {_VERSION}"):
                db.execute(statement)
        elif owner != _OURS:
            raise StoreError("it is a database of something else")
        elif version != _VERSION:
            raise StoreError(f"its form is version {version}, and this server reads version {_VERSION}")
        elif (health := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise StoreError(f"it is damaged ({health})")
    for setting in ("journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON", "secure_delete = ON"):
        db.execute(f"PRAGMA {setting}")
