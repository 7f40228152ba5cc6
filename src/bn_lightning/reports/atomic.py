"""Files that a reader finds old or new, never half written."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["atomic_write"]


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Write a file beside the old one and put it in its place at the end; after an exception the old one stays.

    Folders on the way are made.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with atomic_write(folder / "new" / "a.txt") as file:
        ...     _ = file.write(b"whole")
        >>> (folder / "new" / "a.txt").read_text()
        'whole'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not `tempfile`, whose files only their owner may read.
    temporary = path.parent / f".{path.stem}-{uuid.uuid4().hex}{path.suffix}"
    try:
        with open(temporary, "xb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
