"""The command ``bn-lightning`` and its subcommands."""

import os
import sys
import traceback
from importlib import import_module
from typing import Any

from jsonargparse import ArgumentParser, auto_cli

from bn_lightning.errors import BatchNormError, first_line

__all__ = ["main"]

COMMANDS = ("demo", "inspect", "audit", "recalibrate", "convert", "fold", "zoo")


def main(arguments: list[str] | None = None) -> None:
    """Run ``bn-lightning`` with the given arguments, or those of the process.

    Raises:
        SystemExit: With status 1 and one sentence if something the user can mend is wrong.
    """
    try:
        auto_cli(_commands(arguments), args=arguments, prog="bn-lightning", parser_class=_Parser)
    except BatchNormError as error:
        sys.exit(f"bn-lightning: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # head, or a pager that was left, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        sys.exit(1)
    except Exception as error:  # of the user's own code, which runs here
        place = traceback.extract_tb(error.__traceback__)[-1]
        sys.exit(f"bn-lightning: {first_line(error).rstrip('.')} (in line {place.lineno} of {place.filename})")


def _commands(arguments: list[str] | None) -> dict[str, Any]:
    """Import the command that is meant, or for ``--help`` all of them: each brings in only what it needs."""
    given = sys.argv[1:] if arguments is None else arguments
    meant = given[:1] if given[:1] and given[0] in COMMANDS else COMMANDS
    return {name: getattr(import_module(f"bn_lightning.cli.{name}"), name) for name in meant}


class _Parser(ArgumentParser):
    """Takes ``--json`` for ``--json true``: a switch needs no value."""

    def add_argument(self, *args: Any, **options: Any) -> Any:
        if options.get("type") is bool:
            del options["type"]
            options["action"] = "store_true"
        return super().add_argument(*args, **options)
