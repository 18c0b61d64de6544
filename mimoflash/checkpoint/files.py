"""What makes a write safe: data on the disk before the name appears, folders swapped whole, a full disk named."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sync(path: Path) -> None:
    """Flushes a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot flush a folder
            raise
    finally:
        os.close(handle)


def swap_in(new: Path, target: Path) -> None:
    """Flushes the folder `new` and everything in it and renames it to `target`; what stood there goes afterwards.

    At every moment `target` is the old folder or the new one, whole, except between two renames where an old one has
    to make room: then it is beside it as `.old-*`.
    """
    for path in sorted(new.rglob("*"), reverse=True):
        sync(path)
    sync(new)
    old = target.with_name(f".old-{target.name}-{uuid.uuid4().hex[:8]}")
    if target.exists():
        target.rename(old)
    new.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, which becomes `target` if the block ends well and goes if it does not.

    Raises OSError (ENOSPC) naming the folder where the disk is full; `target` then stands as before.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".new-{target.name}-{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir()
        yield temporary
        swap_in(temporary, target)
    except Exception as error:
        if _disk_full(error):
            message = f"the disk is full: {target} was not written, and what stood there stands. Free space and retry"
            raise OSError(errno.ENOSPC, message) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _disk_full(error: Exception) -> bool:
    """Also as safetensors reports it, which is not an OSError."""
    return getattr(error, "errno", None) == errno.ENOSPC or "(os error 28)" in str(error)
