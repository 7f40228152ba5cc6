"""Show how far long work is, to somebody who sits at a terminal."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["progress", "without_progress"]

_AFTER = 1.0
_EVERY = 0.1
_hidden: ContextVar[bool] = ContextVar("hidden", default=False)


@contextmanager
def progress(task: str, total: int | None = None, *, show: bool = True) -> Iterator[Callable[[], None]]:
    """Draw a bar on ``stderr`` while the work goes on, from its second second on; nothing where that is no terminal.

    Args:
        task: What is being done.
        total: Of how many steps; ``None`` if nobody knows.
        show: ``False`` where somebody else draws on the terminal.

    Yields:
        A function to call after each step. It is the only one that draws: there is no thread, nothing is caught, and
        the bar is gone when the work ends, however it ends.

    Example:
        >>> with progress("counting", 3) as advance:
        ...     for _ in range(3):
        ...         advance()
    """
    if not show or _hidden.get() or sys.stderr is None or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    # Its streams are left alone: whatever else the work prints goes where it would have gone.
    bar = Progress(
        console=Console(stderr=True),
        transient=True,
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    row = bar.add_task(task, total=total)
    shown = time.monotonic() + _AFTER - _EVERY

    def advance() -> None:
        nonlocal shown
        bar.advance(row)
        now = time.monotonic()
        if now - shown >= _EVERY:
            shown = now
            bar.start()
            bar.refresh()

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()


@contextmanager
def without_progress() -> Iterator[None]:
    """Draw no bar for as long as the context lasts: somebody else draws on the terminal.

    Example:
        >>> with without_progress(), progress("counting", 3) as advance:
        ...     advance()
    """
    token = _hidden.set(True)
    try:
        yield
    finally:
        _hidden.reset(token)
