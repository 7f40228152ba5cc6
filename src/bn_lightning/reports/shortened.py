"""Long names that have to fit."""

__all__ = ["shortened"]


def shortened(name: str, longest: int = 56) -> str:
    """Shorten a name in the middle, keeping more of its end.

    Example:
        >>> shortened("encoder.layer.11.output.dense", 16)
        'encod…tput.dense'
    """
    if len(name) <= longest:
        return name
    tail = 2 * longest // 3
    return f"{name[: longest - tail - 1]}…{name[-tail:]}"
