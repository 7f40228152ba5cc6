"""``bn-lightning``: the library from a terminal."""

from bn_lightning.cli.main import main

__all__ = ["main"]
