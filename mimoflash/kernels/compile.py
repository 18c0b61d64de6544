"""Compiles the C++ kernels, one library for each instruction set: `python -m mimoflash.kernels.compile`.

pip does it on installation (setup.py); by hand it is needed after a change, or where there was no compiler then.
Standard library only: setup.py runs this file alone.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).parent / "cpu"
SOURCES = ["linear.cpp", "forward.cpp"]
# The same bits on every path: products are fused with sums where the sources say so and nowhere else.
FLAGS = "-std=c++20 -O3 -ffp-contract=off -fPIC -shared -fvisibility=hidden -Wall -Wextra -Wno-psabi".split()
FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # GCC 12 warns of its own avx512fintrin.h
# Ascending: each runs where all before it do. Baseline x86-64 or ARM is "base".
INSTRUCTION_SETS: dict[str, list[str]] = {"base": []} | (
    {
        "avx2": "-mavx2 -mfma".split(),
        "avx512": "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni".split(),
    }
    if platform.machine().lower() in ("x86_64", "amd64")
    else {}
)


def fingerprint() -> str:
    """Of all sources and flags: a library compiled from others may have other structures, or mistakes since mended."""
    sources = sorted([*FOLDER.glob("*.h"), *FOLDER.glob("*.cpp")])
    digest = hashlib.sha256(repr((FLAGS, INSTRUCTION_SETS)).encode())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def library_path(name: str) -> Path:
    """Where the library for an instruction set lies, whether it is there or not."""
    return FOLDER / f"{name}.so"


def compile_library(name: str, to: Path) -> None:
    """Compiles the kernels for the instruction set `name` into the file `to`. Raises OSError or CalledProcessError."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or "g++"
    to.parent.mkdir(parents=True, exist_ok=True)
    unfinished = to.with_suffix(f".{os.getpid()}.tmp")  # a running process may have the old one open
    command = [*compiler.split(), *FLAGS, *INSTRUCTION_SETS[name], f'-DMF_INTERFACE="{fingerprint()}"']
    command += [str(FOLDER / source) for source in SOURCES]
    try:
        subprocess.run([*command, "-o", str(unfinished)], check=True)
        unfinished.replace(to)
    finally:
        unfinished.unlink(missing_ok=True)


def main() -> None:
    """Compiles what is older than the sources, as far as the compiler is able to; exits with 1 if "base" failed."""
    changed = max(file.stat().st_mtime for file in [Path(__file__), *FOLDER.glob("*.h"), *FOLDER.glob("*.cpp")])

    def attempt(name: str) -> bool:
        library = library_path(name)
        if library.exists() and library.stat().st_mtime > changed:
            return True
        try:
            compile_library(name, library)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"mimoflash: no kernels for {name}: {error}", file=sys.stderr)
            return False
        return True

    with ThreadPoolExecutor() as pool:
        compiled = list(pool.map(attempt, INSTRUCTION_SETS))
    sys.exit(not compiled[0])


if __name__ == "__main__":
    main()
