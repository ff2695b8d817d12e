"""Files that are either there whole or not at all."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

log = logging.getLogger("speech.files")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file by way of an unfinished one, which does not stay; raise OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(".part", f"{path.name}.", path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed server left half written."""
    for path in folder.glob("*.part"):
        remove(path)


def remove(path: Path) -> bool:
    """Remove a file; False, and a line in the log, where the disk does not let it go."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s cannot be removed: %s", path, error.strerror)
        return False
    return True
