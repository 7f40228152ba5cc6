"""The command ``bn-lightning`` and its subcommands."""

import sys

from bn_lightning.errors import BatchNormError

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Run ``bn-lightning`` with the given arguments, or those of the process.

    Raises:
        SystemExit: With status 1 and one sentence if something the user can mend is wrong.
    """
    from jsonargparse import auto_cli

    # Here, so that importing this room brings in neither Lightning nor torchmetrics.
    from bn_lightning.cli.demo import demo

    try:
        auto_cli({"demo": demo}, args=arguments, prog="bn-lightning")
    except BatchNormError as error:
        sys.exit(f"bn-lightning: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
