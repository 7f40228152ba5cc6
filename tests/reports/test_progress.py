"""A bar on a terminal, nothing elsewhere, gone when the work ends."""

import io

import pytest

from bn_lightning.reports import progress as room
from bn_lightning.reports.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(room, "_AFTER", 0.0)
    monkeypatch.setattr(room, "_EVERY", 0.0)


def terminal(monkeypatch):
    """Made in the test itself: between a fixture and its test pytest sets its own stream."""
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    return stream


def run(**options):
    with progress("measuring", 4, **options) as advance:
        for _ in range(2):
            advance()


def test_a_terminal_sees_task_and_share(monkeypatch):
    stream = terminal(monkeypatch)
    run()
    assert "measuring" in stream.getvalue()
    assert "50%" in stream.getvalue()
    assert stream.getvalue().endswith("\x1b[2K"), "the line is wiped"


def test_it_waits_before_it_shows(monkeypatch):
    stream = terminal(monkeypatch)
    monkeypatch.setattr(room, "_AFTER", 1e6)
    run()
    assert stream.getvalue() == ""


def test_off_or_no_terminal_shows_nothing(monkeypatch):
    stream = terminal(monkeypatch)
    run(show=False)
    assert stream.getvalue() == ""
    plain = io.StringIO()
    monkeypatch.setattr("sys.stderr", plain)
    run()
    assert plain.getvalue() == ""
    monkeypatch.setattr("sys.stderr", None)
    run()


def test_an_interrupt_passes_and_the_cursor_comes_back(monkeypatch):
    stream = terminal(monkeypatch)

    def interrupted():
        with progress("measuring", 4) as advance:
            advance()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    written = stream.getvalue()
    assert written.rfind("\x1b[?25h") > written.rfind("\x1b[?25l")
