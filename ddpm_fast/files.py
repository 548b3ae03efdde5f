"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from uuid import uuid4


def check_folder(folder: Path) -> None:
    """Refuse, before any work, a folder that cannot be written in. Makes it, with its parents.

    Raises:
        OSError: naming the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{folder} cannot be written: {error.strerror or error}") from error


def replace(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """Write through a temporary file beside ``path``, then rename."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            fill(file)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A new folder to write in, which takes the place of ``folder`` when the block ends without an error.

    What was there is replaced; with an error, or a process that is killed, it stays as it was.
    """
    new, old = (folder.with_name(f".{folder.name}.{uuid4().hex}.{state}") for state in ("new", "old"))
    new.mkdir(parents=True)
    try:
        yield new
        for file in (*new.rglob("*"), new):
            _sync(file)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        _sync(folder.parent)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """To the disk, so that a name that outlives a power cut has its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def as_any_other(file: Path) -> None:
    """Give it the permissions of any new file: one of safetensors' is private."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(file, 0o666 & ~umask)
