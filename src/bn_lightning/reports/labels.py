"""Many names along an axis, painted in a tenth of the time that as many matplotlib texts take."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image, ImageDraw, ImageFont

__all__ = ["Labels", "labels_width"]

_GAP = 5.0  # points between the names and the axes


class Labels(Artist):
    """Names left of an axes, one at each of the given heights, or below it and upright, one at each place.

    matplotlib lays out and renders every letter anew, about 2 ms a name. Where the picture is made of pixels, these are
    painted by Pillow with the same font; into a PDF or SVG they go as text.

    Args:
        axes: Where they stand; shown along its y axis, or along its x axis if ``upright``.
        names: What to write.
        places: Where, in data coordinates of that axis.
        size: Points.
        upright: Whether they are turned by 90° and stand below.
    """

    def __init__(
        self, axes: Axes, names: Sequence[str], places: Sequence[float], *, size: float, upright: bool = False
    ) -> None:
        super().__init__()
        self.names, self.places, self.size, self.upright = list(names), list(places), size, upright
        self._axes = axes
        self.set_figure(axes.figure)
        axes.figure.add_artist(self)

    def get_window_extent(self, renderer: Any = None) -> Bbox:
        """Return the space they take, in pixels."""
        box, dpi = self._axes.bbox, self._axes.figure.dpi
        width, gap = labels_width(self.names, self.size, dpi), _GAP * dpi / 72
        if self.upright:
            return Bbox.from_extents(box.x0, box.y0 - gap - width, box.x1, box.y0 - gap)
        return Bbox.from_extents(box.x0 - gap - width, box.y0, box.x0 - gap, box.y1)

    def draw(self, renderer: Any) -> None:
        """Paint them."""
        if not self.get_visible():
            return
        if isinstance(renderer, RendererAgg):
            self._paint(renderer)
        else:
            self._write(renderer)

    def _pixels(self) -> "np.ndarray[Any, Any]":
        """Find the places in pixels of the canvas, from the left or from the bottom."""
        along = int(not self.upright)
        points = np.zeros((len(self.places), 2))
        points[:, along] = self.places
        return self._axes.transData.transform(points)[:, along]

    def _paint(self, renderer: RendererAgg) -> None:
        font = _font(self.size, renderer.dpi)
        space = self.get_window_extent()
        start, stop = (space.x0, space.x1) if self.upright else (space.y0, space.y1)
        margin = _line(self.size, renderer.dpi)
        length = round(stop - start) + 2 * margin
        width = round(space.height if self.upright else space.width) + 1
        ink = Image.new("L", (width, length))
        brush = ImageDraw.Draw(ink)
        for name, place in zip(self.names, self._pixels() - start, strict=True):
            across = margin + (place if self.upright else stop - start - place)
            # Not rounded: the middle of a row is at a half as often as not, and names would jump by a pixel.
            brush.text((width, math.floor(across + 0.25)), name, font=font, fill=255, anchor="rm")
        coverage = np.asarray(ink)
        if self.upright:
            coverage = np.rot90(coverage)
        painted = np.zeros((*coverage.shape, 4), dtype=np.uint8)
        painted[..., 3] = coverage
        left, bottom = (start - margin, space.y0) if self.upright else (space.x0, start - margin)
        gc = renderer.new_gc()
        renderer.draw_image(gc, round(left), round(bottom), painted[::-1])
        gc.restore()

    def _write(self, renderer: Any) -> None:
        space = self.get_window_extent()
        rotation = 90 if self.upright else 0
        for name, place in zip(self.names, self._pixels(), strict=True):
            x, y = (place, space.y1) if self.upright else (space.x1, place)
            across, along = ("center", "top") if self.upright else ("right", "center_baseline")
            text = Text(x, y, name, fontsize=self.size, ha=across, va=along, rotation=rotation, parse_math=False)
            text.set_figure(self._axes.figure)
            text.draw(renderer)


def labels_width(names: Sequence[str], size: float, dpi: float) -> int:
    """Return the pixels that the widest name takes.

    Example:
        >>> labels_width(["a"], 8, 100) < labels_width(["a", "layer1.0.conv1"], 8, 100)
        True
    """
    font = _font(size, dpi)
    return round(max((font.getlength(name) for name in names), default=0.0)) + 1


def _line(size: float, dpi: float) -> int:
    return round(size * dpi / 72)


@lru_cache(maxsize=16)
def _font(size: float, dpi: float) -> ImageFont.FreeTypeFont:
    path = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    return ImageFont.truetype(path, _line(size, dpi), layout_engine=ImageFont.Layout.BASIC)
