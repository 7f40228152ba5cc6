"""A table that reads well in a terminal, in a log file and in a notebook."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

__all__ = ["Cell", "Table", "format_cell", "markdown_escaped"]

# Escaped by a backslash or, where not every reader of Markdown knows that one, as an entity.
_MARKDOWN = {
    **{ord(sign): f"\\{sign}" for sign in "\\`*_[]|"},
    **{ord(sign): f"&#{ord(sign)};" for sign in "<>&~#"},
    ord("\n"): " ",
}

Cell = str | int | float | None


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under column heads, with a title above and notes below.

    Args:
        title: One line.
        columns: The column heads, units in them.
        rows: One sequence a row, as long as ``columns``. Numbers are shown to three significant digits,
            ``None`` as a dash.
        notes: Lines of plain text below.

    Example:
        >>> print(Table("sizes", ("layer", "width"), [("conv1", 64), ("fc", 0.12345)]))
        sizes
          layer   width
         ───────────────
          conv1      64
          fc      0.123
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        from rich.console import Console

        # Wide enough that nothing wraps: a log file has no terminal width.
        console = Console(file=StringIO(), width=10_000, color_system=None, legacy_windows=False)
        console.print(self._rich())
        assert isinstance(console.file, StringIO)
        drawn = [line.rstrip() for line in console.file.getvalue().splitlines()]
        return "\n".join([self.title, *filter(None, drawn), *self.notes])

    def print(self, console: "Console | None" = None) -> None:
        """Print to the terminal, within its width; as plain text that never wraps where there is no terminal.

        In a narrow terminal names are shortened in the middle and remarks wrapped between words; in a very narrow one
        each row becomes a paragraph.

        Args:
            console: Where to; by default standard output.
        """
        from bn_lightning.reports.terminal import print_table

        print_table(self, console)

    def to_markdown(self) -> str:
        r"""Return the table in GitHub's Markdown, which TensorBoard's text tab shows; every name is escaped.

        Example:
            >>> print(Table("sizes", ("layer", "width"), [("conv_1", 64)], ["in channels"]).to_markdown())
            **sizes**
            <BLANKLINE>
            | layer | width |
            | --- | ---: |
            | conv\_1 | 64 |
            <BLANKLINE>
            in channels
        """
        lines = [
            [markdown_escaped(column) for column in self.columns],
            ["---:" if self.is_numeric(index) else "---" for index in range(len(self.columns))],
            *([markdown_escaped(format_cell(cell)) for cell in row] for row in self.rows),
        ]
        rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join([f"**{markdown_escaped(self.title)}**", rows, *map(markdown_escaped, self.notes)])

    def is_numeric(self, column: int) -> bool:
        """Tell whether a column holds a number."""
        return any(isinstance(row[column], int | float) for row in self.rows)

    def _repr_html_(self) -> str:
        """Draw the table for a notebook; every name is escaped."""
        head = "".join(f"<th>{html.escape(column)}</th>" for column in self.columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(format_cell(cell))}</td>" for cell in row) + "</tr>"
            for row in self.rows
        )
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return (
            f"<table><caption>{html.escape(self.title)}</caption>"
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{notes}"
        )

    def _rich(self) -> "RichTable":
        from rich import box
        from rich.markup import escape
        from rich.table import Table as RichTable

        table = RichTable(box=box.SIMPLE_HEAD)
        for index, column in enumerate(self.columns):
            table.add_column(escape(column), justify="right" if self.is_numeric(index) else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*(escape(format_cell(cell)) for cell in row))
        return table


def format_cell(value: Cell) -> str:
    """Show a number to three significant digits, a count exactly, and nothing as a dash.

    Example:
        >>> [format_cell(value) for value in (None, 1797, 0.000123456, 12.3456, float("nan"))]
        ['–', '1797', '0.000123', '12.3', 'nan']
    """
    if value is None:
        return "–"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.3g}"
    return str(value)


def markdown_escaped(text: str) -> str:
    r"""Keep a name from being read as Markdown or HTML.

    Example:
        >>> print(markdown_escaped("conv_1<b>"))
        conv\_1&#60;b&#62;
    """
    return text.translate(_MARKDOWN)
