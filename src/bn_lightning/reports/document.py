"""Pages that need nothing else: no network, no script, pictures inside."""

import base64
import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bn_lightning.reports.heatmap import figure_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["document", "fragment", "picture", "table"]

# Every rule begins with the class, so that a notebook around a fragment keeps its own look. Colours are mixed from the
# text's own, whether that is dark on light or light on dark; pictures lie on white.
_STYLE = """
.bnl-report{font:15px/1.5 system-ui,sans-serif;max-width:66rem}
.bnl-report h1{font-size:1.45rem;margin:0}.bnl-report h2{font-size:1.15rem;margin:2rem 0 .4rem}
.bnl-report h3{font-size:1rem;margin:0 0 .3rem}
.bnl-report p{margin:.3rem 0}.bnl-report .small{font-size:.86rem;opacity:.85}
.bnl-report section.card{border:1px solid rgba(128,128,128,.35);border-left:5px solid #808080;border-radius:4px;
padding:.6rem .9rem;margin:.7rem 0;break-inside:avoid}
.bnl-report .error{border-left-color:#c8322b!important}.bnl-report .warning{border-left-color:#e08a1e!important}
.bnl-report .info{border-left-color:#5b8fc7!important}.bnl-report .fine{border-left-color:#3a8f4d!important}
.bnl-report pre{background:rgba(128,128,128,.14);padding:.45rem .6rem;margin:.3rem 0;border-radius:3px;
white-space:pre-wrap;overflow-wrap:anywhere;user-select:all;font:.86rem/1.45 ui-monospace,monospace}
.bnl-report table{border-collapse:collapse;font-size:.86rem;margin:.4rem 0}
.bnl-report th,.bnl-report td{border-bottom:1px solid rgba(128,128,128,.3);padding:.12rem .7rem .12rem 0;
text-align:left;vertical-align:top;overflow-wrap:anywhere}
.bnl-report td.number,.bnl-report th.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.bnl-report img{display:block;max-width:100%;background:#fff;border-radius:4px;margin:.5rem 0;break-inside:avoid}
.bnl-report summary{cursor:pointer}
@media print{.bnl-report{max-width:none;font-size:12px}}
"""
_PAGE = """
:root{color-scheme:light dark}body{margin:2rem auto;padding:0 1rem;max-width:66rem;color:CanvasText;background:Canvas}
@media print{:root{color-scheme:light}body{margin:0;max-width:none}}
"""


def document(title: str, body: str) -> str:
    """Make a whole page.

    Args:
        title: Plain text; it is escaped.
        body: HTML, such as of `picture` and `table`, in which every name is escaped.

    Example:
        >>> page = document("a < b", "<p>both</p>")
        >>> "<title>a &lt; b</title>" in page, "http" in page, "<script" in page
        (True, False, False)
    """
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_PAGE}</style></head><body>{fragment(body)}</body></html>\n"
    )


def fragment(body: str) -> str:
    """Make the part of a page that a notebook shows."""
    return f'<div class="bnl-report"><style>{_STYLE}</style>{body}</div>'


def picture(figure: "Figure", alt: str) -> str:
    """Make an image that holds the figure as PNG."""
    data = base64.b64encode(figure_png(figure)).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = ()) -> str:
    """Make a table of plain text, which is escaped; the columns ``numbers`` are set to the right."""

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = ((cell, ' class="number"' if index in numbers else "") for index, cell in enumerate(cells))
        return "<tr>" + "".join(f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for cell, kind in kinds) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table><thead>{line(columns, 'th')}</thead><tbody>{body}</tbody></table>"
