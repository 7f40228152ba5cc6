"""One family of errors: what went wrong, where, and what to do about it."""

import difflib
from collections.abc import Iterable

__all__ = [
    "AuditError",
    "BatchNormError",
    "ConversionError",
    "FoldError",
    "RecalibrationError",
    "SingleValueError",
    "first_line",
    "nearest",
]


class BatchNormError(ValueError):
    """Base of every error this library raises on purpose."""


class ConversionError(BatchNormError):
    """A BatchNorm layer cannot be replaced as asked."""


class FoldError(BatchNormError):
    """A network cannot be folded as asked."""


class AuditError(BatchNormError):
    """A network cannot be audited with what was given."""


class RecalibrationError(BatchNormError):
    """Population statistics cannot be measured with what was given."""


class SingleValueError(RecalibrationError):
    """A layer that normalizes by batch statistics was given one value per channel, which has no variance.

    Attributes:
        layer: The layer's name.
        shape: That of its input.
    """

    def __init__(self, message: str, layer: str, shape: tuple[int, ...]) -> None:
        super().__init__(message, layer, shape)
        self.layer = layer
        self.shape = shape

    def __str__(self) -> str:
        return str(self.args[0])


def first_line(exception: BaseException) -> str:
    """Tell an exception in one line: its type, and its cause's message if there is a cause.

    Example:
        >>> first_line(KeyError("weight"))
        "KeyError: 'weight'"
    """
    exception = exception.__cause__ or exception
    return f"{type(exception).__name__}: {(str(exception).strip() or 'no message').splitlines()[0]}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Ask whether another name was meant, if one is near.

    Example:
        >>> nearest("gost", ["frozen", "ghost"])
        " (did you mean 'ghost'?)"
    """
    found = difflib.get_close_matches(name.lower(), list(known), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""
