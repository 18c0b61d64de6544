"""Responses in a database: kept, bounded, found again after a restart, and nothing else's file is touched."""

import asyncio
import sqlite3
import stat
from contextlib import closing

import pytest

from mimoflash.serve.store import MEMORY, Store, StoreError


def response(name: str, text: str = "Yes.") -> dict:
    return {"id": f"resp_{name}", "output": [{"id": f"msg_{name}", "type": "message", "text": text}]}


def question(name: str, text: str = "Is it?") -> dict:
    return {"id": f"in_{name}", "type": "message", "text": text}


def with_store(path, work, **bounds):
    """What `work` returns of a store that is opened and closed again."""

    async def main():
        store = Store(str(path), **bounds)
        try:
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(main())


async def kept(store: Store, names) -> list[str]:
    return [name for name in names if await store.get(f"resp_{name}")]


def test_a_response_is_found_again_after_a_restart(tmp_path):
    path = tmp_path / "responses.db"

    async def write(store):
        await store.put(response("a", "Ünïcode \0 \ud800"), [question("a")], ["msg_a"])

    async def read(store):
        return await store.get("resp_a"), await store.item("msg_a"), await store.item("in_a"), await store.get("resp_b")

    with_store(path, write)
    stored, item, unnamed, missing = with_store(path, read)
    assert stored.response == response("a", "Ünïcode \0 \ud800")
    assert stored.conversation == [question("a")]
    assert item == stored.response["output"][0]
    assert unnamed is None
    assert missing is None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_was_written_outlives_a_process_that_does_not_close(tmp_path):
    async def main():
        await Store(str(tmp_path / "r.db")).put(response("a"), [])
        return await Store(str(tmp_path / "r.db")).get("resp_a")

    assert asyncio.run(main()).response == response("a")


def test_the_oldest_are_dropped_with_their_items():
    async def work(store):
        for name in "abcde":
            await store.put(response(name), [question(name)], [f"msg_{name}", f"in_{name}"])
        items = [name for name in "abcde" if await store.item(f"in_{name}")]
        return await kept(store, "abcde"), items

    assert with_store(MEMORY, work, most=3) == (["c", "d", "e"], ["c", "d", "e"])


def test_no_more_bytes_are_kept_than_may_be():
    async def work(store):
        for name, size in (("a", 10), ("b", 400), ("c", 400), ("d", 400)):
            await store.put(response(name, "x" * size), [])
        few = await kept(store, "abcd")
        await store.put(response("e", "x" * 5000), [])
        return few, await kept(store, "abcde")

    assert with_store(MEMORY, work, most_bytes=1100) == (["c", "d"], ["e"])


def test_a_deleted_response_is_gone_and_leaves_no_text(tmp_path):
    async def work(store):
        await store.put(response("a", "a secret"), [question("a", "of somebody")], ["msg_a"])
        await store.put(response("b"), [])
        return [await store.delete("resp_a"), await store.delete("resp_a"), await store.item("msg_a")]

    assert with_store(tmp_path / "r.db", work) == [True, False, None]
    left = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"resp_b" in left
    assert b"secret" not in left
    assert b"somebody" not in left


def test_two_servers_may_write_at_once(tmp_path):
    async def main():
        stores = [Store(str(tmp_path / "r.db")) for _ in range(2)]
        names = [f"{i}_{n}" for i in range(2) for n in range(30)]
        await asyncio.gather(*(stores[int(name[0])].put(response(name), []) for name in names))
        found = await kept(stores[0], names)
        for store in stores:
            await store.close()
        return found, names

    found, names = asyncio.run(main())
    assert found == names


def a_text(path):
    path.write_text("shopping list: milk, tea and a good many other things" * 100)


def a_folder(path):
    path.mkdir()


def a_foreign_database(path):
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE birds (name)")


def another_version(path):
    with_store(path, lambda store: store.put(response("a"), []))
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 7")


def a_damaged_one(path):
    with_store(path, lambda store: store.put(response("a", "x" * 50_000), []))
    content = bytearray(path.read_bytes())
    for page in range(1, len(content) // 4096):
        content[page * 4096 : page * 4096 + 64] = b"\xff" * 64
    path.write_bytes(content)


@pytest.mark.parametrize(("make", "words"), [
    (a_text, "not a database"), (a_folder, "cannot be opened"), (a_foreign_database, "something else"),
    (another_version, "version 7"), (a_damaged_one, "damaged|malformed"),
])
def test_a_file_that_is_no_store_is_named_and_left_alone(tmp_path, make, words):
    path = tmp_path / "thing"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(StoreError, match=words) as raised:
        Store(str(path))
    assert str(path) in str(raised.value)
    assert (path.read_bytes() if path.is_file() else None) == before


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(StoreError, match="cannot be opened"):
        Store(str(tmp_path / "nowhere" / "r.db"))


def test_a_database_that_fails_later_says_which_one(tmp_path):
    async def work(store):
        await store.put(response("a"), [])
        with closing(sqlite3.connect(tmp_path / "r.db")) as db:
            db.execute("DROP TABLE responses")
        with pytest.raises(StoreError, match=r"r\.db: no such table"):
            await store.get("resp_a")

    with_store(tmp_path / "r.db", work)
