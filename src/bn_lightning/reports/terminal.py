"""Print a table into the width there is."""

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from bn_lightning.reports.shortened import shortened
from bn_lightning.reports.table import format_cell

if TYPE_CHECKING:
    from bn_lightning.reports.table import Table

__all__ = ["print_table"]

# What rich puts between two columns, and left and right of the table.
_BETWEEN, _AROUND = 3, 1
_SHORTEST_NAME, _NARROWEST_REMARK = 16, 24
_REMARK = "yellow"


def print_table(table: "Table", console: Console | None = None) -> None:
    """Print a table; see `Table.print`."""
    console = console or Console()
    if console.is_terminal:
        with console.capture() as captured:
            console.print(Text(table.title, "bold"))
            _print_rows(table, console)
            for note in table.notes:
                console.print(Text(note, "dim"))
        text = captured.get()
    else:
        text = f"{table}\n"
    # A terminal or a file that has no Greek letters is no reason to end a run.
    encoding = console.encoding or "utf-8"
    console.file.write(text.encode(encoding, "replace").decode(encoding))


def _print_rows(table: "Table", console: Console) -> None:
    if not table.rows:
        return
    cells = [[format_cell(cell) for cell in row] for row in table.rows]
    name_width = _name_width(table, cells, console.width)
    if name_width is None:
        for row in cells:
            for line in _paragraph(table.columns, row, console.width):
                console.print(Text(line), soft_wrap=True)
        return
    names, *remarks = _text_columns(table)
    drawn = RichTable(box=box.SIMPLE_HEAD)
    for index, head in enumerate(table.columns):
        wraps = index in remarks
        drawn.add_column(
            Text(head),
            justify="right" if table.is_numeric(index) else "left",
            no_wrap=not wraps,
            min_width=_least_width([head, *(row[index] for row in cells)]) if wraps else None,
            style=_REMARK if wraps else "",
        )
    for row in cells:
        fitting = [shortened(cell, name_width) if index == names else cell for index, cell in enumerate(row)]
        drawn.add_row(*map(Text, fitting))
    console.print(drawn)


def _text_columns(table: "Table") -> list[int]:
    """Return that of the names, which is the first one if all hold numbers, and those of remarks."""
    return [index for index in range(len(table.columns)) if not table.is_numeric(index)] or [0]


def _name_width(table: "Table", cells: Sequence[Sequence[str]], width: int) -> int | None:
    """Find how wide the first column of text can be; ``None`` if the table does not fit with one of 16 letters."""
    names, *remarks = _text_columns(table)
    left = width - _AROUND - _BETWEEN * len(table.columns)
    for index, head in enumerate(table.columns):
        column = [head, *(row[index] for row in cells)]
        if index != names:
            left -= _least_width(column) if index in remarks else max(map(len, column))
    longest = max(len(table.columns[names]), *(len(row[names]) for row in cells))
    return longest if longest <= left else left if left >= _SHORTEST_NAME else None


def _least_width(texts: Sequence[str]) -> int:
    """Return what a column of text needs to be read: 24 letters if it has as many, and never less than a word."""
    longest_word = max((len(word) for text in texts for word in text.split()), default=1)
    return max(longest_word, min(_NARROWEST_REMARK, max(map(len, texts))))


def _paragraph(heads: Sequence[str], row: Sequence[str], width: int) -> Iterator[str]:
    """Write a row below its first cell, as many cells a line as fit.

    Example:
        >>> list(_paragraph(["layer", "mean", "std"], ["conv1", "0.5", "1"], 12))
        ['conv1', '  mean 0.5', '  std 1']
    """
    yield shortened(row[0], width)
    lines: list[str] = []
    for item in (f"{head} {cell}" for head, cell in zip(heads[1:], row[1:], strict=True) if cell):
        if lines and len(f"  {lines[-1]}   {item}") <= width:
            lines[-1] += f"   {item}"
        else:
            lines.append(item)
    for line in lines:
        yield from textwrap.wrap(line, width, initial_indent="  ", subsequent_indent="    ")
