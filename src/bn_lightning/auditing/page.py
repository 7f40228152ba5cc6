"""The audit as one HTML file that needs nothing else."""

import base64
import html
from typing import TYPE_CHECKING

from bn_lightning.auditing.finding import Finding
from bn_lightning.auditing.losses import LossReadings
from bn_lightning.reports.heatmap import figure_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["page"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #222;
       background: #fff; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; margin: .5rem 0; } caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { border-bottom: 1px solid #ddd; padding: .2rem .6rem; text-align: left; vertical-align: top; }
pre { background: #f4f4f4; padding: .5rem; white-space: pre-wrap; overflow-wrap: anywhere; }
img { max-width: 100%; } .error { color: #b3261e; } .warning { color: #a85f00; } .info { color: #1f5fa8; }
.small { color: #555; font-size: 13px; } @media print { body { margin: 0; max-width: none; } }
"""


def page(
    title: str,
    verdict: str,
    groups: list[list[Finding]],
    losses: LossReadings | None,
    figure: "Figure | None",
    layers: str,
    missed: list[tuple[str, str]],
) -> str:
    """Build the page; every name and message is escaped, and the picture is inside.

    Args:
        title: One line.
        verdict: One line.
        groups: The findings, those of one rule together, worst first.
        losses: The readings, or ``None``.
        figure: The gaps along the network, or ``None``.
        layers: The table of layers, as HTML.
        missed: What was not looked at, and why.
    """
    parts = [f"<h1>{html.escape(title)}</h1><p><strong>{html.escape(verdict)}</strong></p>"]
    if figure is not None:
        picture = base64.b64encode(figure_png(figure)).decode()
        parts.append(
            f'<img alt="Gap of each layer along the network" src="data:image/png;base64,{picture}">'
            "<p class=\"small\">Gap: how far evaluation's output of a layer is from what the training data's own "
            "statistics would give, in its standard deviations.</p>"
        )
    if groups:
        parts += ["<h2>Findings</h2>", *map(_group, groups)]
    if losses is not None:
        parts += ["<h2>The loss, read in different ways</h2>", _losses(losses)]
    parts += ["<h2>Layers</h2>", layers]
    if missed:
        rows = "".join(f"<li>{html.escape(what)}: {html.escape(why)}</li>" for what, why in missed)
        parts.append(f'<h2>Not looked at</h2><ul class="small">{rows}</ul>')
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _group(found: list[Finding]) -> str:
    worst = found[0]
    where = "the model" if worst.layer is None else worst.layer or "(root)"
    others = ", ".join(html.escape(each.layer or "(root)") for each in found[1:])
    evidence = ", ".join(
        f"{key} = {value:.3g}" if isinstance(value, float) else f"{key} = {value}"
        for key, value in worst.evidence.items()
    )
    return (
        f'<h3 class="{worst.severity}">{worst.severity}: {html.escape(worst.rule)} in {html.escape(where)}</h3>'
        f"<p>{html.escape(worst.message)}.</p><pre>{html.escape(worst.fix)}</pre>"
        f'<p class="small">Evidence: {html.escape(evidence)}. Speaks at: {html.escape(worst.threshold)}.'
        + (f" Likewise in {others}." if others else "")
        + "</p>"
    )


def _losses(losses: LossReadings) -> str:
    readings = "".join(
        f"<tr><td>{name.replace('_', ' ')}</td><td>{each.mean:.4g}</td><td>{each.low:.4g} to {each.high:.4g}</td></tr>"
        for name, each in losses.readings().items()
    )
    told = "".join(f"<li>{html.escape(line)}</li>" for line in losses.sentences())
    return (
        f"<table><caption>On the same {losses.batches} {losses.source} batches</caption><tr><th>reading</th><th>loss"
        f"</th><th>95 % interval</th></tr>{readings}</table><ul>{told}</ul>"
    )
