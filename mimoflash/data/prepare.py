"""Preparing data: sources -> tokenised once -> duplicates dropped -> held-out split -> shards and a manifest.

The folder appears whole or not at all, and is left as it is while nothing that went into it has changed: the sources'
options and files, the tokenizer, the thresholds, and the code that makes, renders and tokenises documents.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import mimoflash.text
import mimoflash.world
from mimoflash.data.dedup import NearDuplicates
from mimoflash.data.encode import Encoded, Encoder, encode_source, worker_pool
from mimoflash.data.shards import ShardReader, ShardWriter
from mimoflash.data.sources import DomainSource, Source, source_files
from mimoflash.text import Tokenizer


@dataclass(frozen=True)
class Prepared:
    """Shards by source name, and the manifest: counts of documents, tokens and duplicates by source, and what they
    were made of.

    A source too small to have a held-out document is not in `held_out`.
    """

    train: dict[str, ShardReader]
    held_out: dict[str, ShardReader]
    manifest: dict[str, Any]


def prepare(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    folder: str | os.PathLike[str],
    *,
    held_out: float = 0.02,
    near_duplicates: float = 0.8,
    workers: int = 1,
) -> Prepared:
    """Make the shards of `sources` in `folder`, or open them if they are there already.

    A fraction `held_out` of the documents of files is held out, by hash; of domains, the world's own tenth of the
    tasks. Documents of files whose similarity to an earlier one of any source is at least `near_duplicates` are
    dropped; of a domain's demonstrations only those of a task that the source already has (tasks differ by a number
    here and there).
    `workers` processes make and tokenise documents; they are started afresh (threads of torch do not
    survive a fork), so that a script which asks for more than one needs the usual `if __name__ == "__main__"`.
    Raises ValueError for unreadable sources, for a leak between the splits, and for a folder that holds something else.
    """
    folder = Path(folder).absolute()
    _check_arguments(sources, held_out)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        tokenizer_folder = Path(temporary, "tokenizer")
        tokenizer.save(tokenizer_folder)
        ingredients = {
            "sources": [_source_ingredients(source) for source in sources],
            "tokenizer": _hash_files(tokenizer_folder),
            "code": [
                _hash_files(Path(file).parent) for file in (__file__, mimoflash.text.__file__, mimoflash.world.__file__)
            ],
            "held_out": held_out,
            "near_duplicates": near_duplicates,
        }
        fingerprint = hashlib.sha256(json.dumps(ingredients, sort_keys=True, default=str).encode()).hexdigest()
        if _fingerprint_of(folder) != fingerprint:
            fresh = Path(temporary, "data")
            fresh.mkdir()
            encoder = Encoder(tokenizer_folder, held_out)
            deduplicator = _Deduplicator(near_duplicates)
            counts = {}
            with worker_pool(encoder, workers) as pool:
                for source in sources:
                    documents = encode_source(source, encoder, pool)
                    counts[source.name] = _write_shards(source, documents, deduplicator, fresh, tokenizer.vocab_size)
            manifest = {"fingerprint": fingerprint, "tokenizer": ingredients["tokenizer"], "sources": counts}
            Path(fresh, "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
            open_prepared(fresh)  # raises before anything is replaced
            if folder.exists():
                folder.rename(Path(temporary, "replaced"))
            fresh.rename(folder)
    return open_prepared(folder)


def open_prepared(folder: str | os.PathLike[str]) -> Prepared:
    """Open a prepared folder and verify it: checksums, and that no held-out task or document is in a training shard."""
    try:
        manifest = json.loads(Path(folder, "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not a folder of prepared data ({error}); prepare the data again") from None
    shards = {
        split: {
            name: ShardReader(Path(folder, f"{name}.{split}.shard"))
            for name, counts in manifest["sources"].items()
            if counts[split]
        }
        for split in ("train", "held_out")
    }
    check_no_leak(shards["train"], {name: shard.identities for name, shard in shards["held_out"].items()})
    return Prepared(shards["train"], shards["held_out"], manifest)


def check_no_leak(train: Mapping[str, ShardReader], held_out: Mapping[str, NDArray[np.uint64]]) -> None:
    """Raises ValueError if a training shard has a held-out identity: `ShardReader.identities`, or `Document.identity`
    of tasks that an evaluation will ask.
    """
    for name, shard in train.items():
        for other, identities in held_out.items():
            leaked = int(np.isin(shard.identities, identities).sum())
            if leaked:
                raise ValueError(
                    f"source {name!r}: {leaked} of {len(shard)} training documents are held out in {other!r} "
                    f"({shard.path}); leave them out of the source and prepare the data again"
                )


class _Deduplicator:
    """Says of each document what it repeats, if anything, and remembers it."""

    def __init__(self, threshold: float):
        self._seen: set[tuple[str, int]] = set()
        self._near = NearDuplicates(threshold)

    def verdict(self, document: Encoded) -> Literal["new", "duplicates", "near_duplicates"]:
        if document.duplicate_key in self._seen:
            return "duplicates"
        if document.signature is not None and self._near.find_or_add(document.signature) is not None:
            return "near_duplicates"
        self._seen.add(document.duplicate_key)
        return "new"


def _write_shards(
    source: Source, documents: Iterable[Encoded], deduplicator: _Deduplicator, folder: Path, vocab_size: int
) -> dict[str, int]:
    """Writes a source's two shards; returns documents and tokens of each split and how many were dropped, by reason."""
    dropped = Counter(empty=0, duplicates=0, near_duplicates=0)
    paths = {split: folder / f"{source.name}.{split}.shard" for split in ("train", "held_out")}
    with ShardWriter(paths["train"], vocab_size) as train, ShardWriter(paths["held_out"], vocab_size) as held_out:
        for document in documents:
            verdict = deduplicator.verdict(document) if len(document.tokens) else "empty"
            if verdict != "new":
                dropped[verdict] += 1
                continue
            writer = held_out if document.held_out else train
            writer.add(document.tokens, document.mask, identity=document.identity, conversation=document.conversation)
    if len(train) == 0:
        raise ValueError(f"source {source.name!r} has no document to train on (dropped: {dict(dropped)})")
    if len(held_out) == 0:
        paths["held_out"].unlink()
    splits = {"train": len(train), "train_tokens": train.tokens, "held_out": len(held_out)}
    return {**splits, "held_out_tokens": held_out.tokens, **dropped}


def _check_arguments(sources: Sequence[Source], held_out: float) -> None:
    names = [source.name for source in sources]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"each source needs a name of its own, not {names}")
    for name in names:
        if not re.fullmatch(r"[\w-][\w.-]*", name):
            raise ValueError(f"source name {name!r} becomes a file's name: use letters, digits, '_', '-' and '.'")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out is the fraction of documents held out, not {held_out}")


def _source_ingredients(source: Source) -> dict[str, Any]:
    if isinstance(source, DomainSource):
        return asdict(source)
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in source_files(source)]
    return {**asdict(source), "files": hashlib.sha256(json.dumps(stats).encode()).hexdigest()}


def _hash_files(folder: Path) -> str:
    """A hash of all files under a folder but compiled ones, by name and content."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _fingerprint_of(folder: Path) -> str | None:
    """The fingerprint in the folder's manifest; None if there is nothing or the manifest cannot be read."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        raise ValueError(
            f"{folder} exists and holds no manifest.json of prepared data: it would be replaced; choose another folder"
        )
    try:
        return str(json.loads(manifest.read_text())["fingerprint"])
    except (ValueError, KeyError, TypeError):
        return None
