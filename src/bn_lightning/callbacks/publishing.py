"""Hand scalars, pictures, texts and histograms to whatever loggers a trainer has."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bn_lightning.internals import add_png
from bn_lightning.reports.atomic import atomic_write
from bn_lightning.reports.heatmap import figure_image, figure_png, save_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["log_figure", "log_histogram", "log_scalars", "log_text", "unused_file"]


def log_scalars(trainer: Any, scalars: dict[str, float], step: int) -> None:
    """Write scalars to every logger of the trainer; without one this does nothing."""
    for logger in trainer.loggers:
        logger.log_metrics(scalars, step=step)


def log_figure(trainer: Any, tag: str, draw: Callable[[], "Figure"], step: int) -> None:
    """Draw a figure once, and write it to every logger that takes one.

    One whose experiment has ``add_image`` (TensorBoard) or that has ``log_image`` (W&B) gets the picture; one that
    keeps a folder (CSV) gets the newest as ``figures/<tag>.png`` in it.
    """
    takers = list(_takers(trainer, "add_image", "log_image"))
    if not takers:
        return
    figure = draw()
    for taker, way in takers:
        if way == "add_image":
            _add_image(taker, tag, figure, step)
        elif way == "log_image":
            taker.log_image(key=tag, images=[figure_image(figure)], step=step)
        else:
            save_png(figure, taker / f"{tag}.png")


def log_text(trainer: Any, tag: str, markdown: str, step: int) -> None:
    """Write a text to every logger that takes one, in the ways of `log_figure`; into a folder as ``<tag>.md``."""
    for taker, way in _takers(trainer, "add_text", "log_text"):
        if way == "add_text":
            taker.add_text(tag, markdown, step)
        elif way == "log_text":
            taker.log_text(key=tag, columns=["text"], data=[[markdown]], step=step)
        else:
            with atomic_write(taker / f"{tag}.md") as file:
                file.write(f"{markdown}\n".encode())


def log_histogram(trainer: Any, tag: str, histogram: dict[str, Any], step: int) -> None:
    """Write a histogram that is counted already to every TensorBoard-like logger.

    Args:
        trainer: The trainer.
        tag: Its name.
        histogram: The arguments of TensorBoard's ``add_histogram_raw``.
        step: The optimizer step.
    """
    for logger in trainer.loggers:
        add = getattr(getattr(logger, "experiment", None), "add_histogram_raw", None)
        if callable(add):
            add(tag, **histogram, global_step=step)


def unused_file(folder: str | Path, name: str) -> Path:
    """Return the path of a file that does not exist yet: ``name``, or that with the first free number.

    Example:
        >>> unused_file("no such folder", "activations.jsonl").as_posix()
        'no such folder/activations.jsonl'
    """
    path = first = Path(folder) / name
    number = 1
    while path.exists():
        path = first.with_stem(f"{first.stem}-{number}")
        number += 1
    return path


def _add_image(experiment: Any, tag: str, figure: "Figure", step: int) -> None:
    width, height = figure.canvas.get_width_height()
    if not add_png(experiment, tag, figure_png(figure), (height, width), step):
        experiment.add_image(tag, figure_image(figure), step, dataformats="HWC")


def _takers(trainer: Any, of_experiment: str, of_logger: str) -> Iterator[tuple[Any, str]]:
    """Go through what takes something, experiments, loggers and folders, with the way it takes it."""
    for logger in trainer.loggers:
        folder = getattr(logger, "log_dir", None)
        experiment = getattr(logger, "experiment", None)  # no part of what a logger has to have
        if callable(getattr(experiment, of_experiment, None)):
            yield experiment, of_experiment
        elif callable(getattr(logger, of_logger, None)):
            yield logger, of_logger
        elif isinstance(folder, str):
            yield Path(folder) / "figures", "file"
