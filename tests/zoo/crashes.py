"""An exception in one line, with the place it came from."""

import traceback
from pathlib import Path

__all__ = ["told"]


def told(exception: BaseException) -> str:
    """Type, first line of the message, file and line."""
    frames = traceback.extract_tb(exception.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    message = (str(exception).strip().splitlines() or [""])[0]
    return f"{type(exception).__name__}: {message[:300]}{place}"
