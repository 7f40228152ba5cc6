"""Which logger gets what, with stand-ins for the loggers that are not installed."""

from types import SimpleNamespace

import numpy as np
import pytest
from lightning.pytorch.loggers.logger import DummyLogger

from bn_lightning.callbacks.publishing import log_figure, log_histogram, log_scalars, log_text, unused_file
from bn_lightning.reports.heatmap import figure_image, heat_map


class Calls:
    """Takes any method that it is told to have, and remembers the calls."""

    def __init__(self, *methods):
        self.calls = []
        for method in methods:
            setattr(self, method, lambda *args, method=method, **kwargs: self.calls.append((method, args, kwargs)))


class TensorBoardLike(Calls):
    def __init__(self):
        super().__init__("log_metrics")
        self.experiment = Calls("add_image", "add_text", "add_histogram_raw")
        self.log_dir = "never"


class WandbLike(Calls):
    def __init__(self):
        super().__init__("log_metrics", "log_image", "log_text")
        self.experiment = Calls("log")


class CsvLike(Calls):
    def __init__(self, folder):
        super().__init__("log_metrics")
        self.experiment, self.log_dir = Calls(), str(folder)


class ScalarsOnly(Calls):
    """No more than Lightning asks of a logger."""

    def __init__(self):
        super().__init__("log_metrics")


@pytest.fixture
def loggers(tmp_path):
    return [TensorBoardLike(), WandbLike(), CsvLike(tmp_path / "csv"), ScalarsOnly()]


def draw():
    return heat_map([[1.0, 2.0]], ["conv1"], [0, 50], title="t")


def test_every_logger_gets_the_scalars(loggers):
    log_scalars(SimpleNamespace(loggers=loggers), {"a": 1.0}, 7)
    assert [logger.calls for logger in loggers] == [[("log_metrics", ({"a": 1.0},), {"step": 7})]] * 4


def test_every_logger_gets_the_picture_in_its_way(loggers, tmp_path):
    drawn = []
    log_figure(SimpleNamespace(loggers=loggers), "bn/heatmap/drift", lambda: drawn.append(1) or draw(), 7)
    assert drawn == [1], "drawn once for all of them"
    board, wandb, _, nothing = loggers
    pixels = figure_image(draw())
    ((_, (tag, image, step), options),) = board.experiment.calls
    assert (tag, step, options) == ("bn/heatmap/drift", 7, {"dataformats": "HWC"})
    np.testing.assert_array_equal(image, pixels)
    ((name, args, options),) = wandb.calls
    assert (name, args, options["key"], options["step"]) == ("log_image", (), "bn/heatmap/drift", 7)
    np.testing.assert_array_equal(options["images"][0], pixels)
    assert (tmp_path / "csv" / "figures" / "bn" / "heatmap" / "drift.png").read_bytes().startswith(b"\x89PNG")
    assert nothing.calls == []


def test_nothing_is_drawn_for_nobody():
    log_figure(SimpleNamespace(loggers=[ScalarsOnly()]), "a", lambda: pytest.fail("drawn"), 7)


def test_every_logger_gets_the_text_in_its_way(loggers, tmp_path):
    log_text(SimpleNamespace(loggers=loggers), "bn/worst", "| a |", 7)
    assert loggers[0].experiment.calls == [("add_text", ("bn/worst", "| a |", 7), {})]
    assert loggers[1].calls == [
        ("log_text", (), {"key": "bn/worst", "columns": ["text"], "data": [["| a |"]], "step": 7})
    ]
    assert (tmp_path / "csv" / "figures" / "bn" / "worst.md").read_text() == "| a |\n"


def test_histograms_are_tensorboards(loggers):
    log_histogram(SimpleNamespace(loggers=loggers), "h", {"min": 1.0}, 7)
    assert loggers[0].experiment.calls == [("add_histogram_raw", ("h",), {"min": 1.0, "global_step": 7})]
    assert all(not logger.calls for logger in loggers)


def test_what_fast_dev_run_puts_in_place_of_loggers_takes_all_of_it():
    trainer = SimpleNamespace(loggers=[DummyLogger()])
    log_scalars(trainer, {"a": 1.0}, 0)
    log_figure(trainer, "a", draw, 0)
    log_text(trainer, "a", "b", 0)
    log_histogram(trainer, "a", {}, 0)


def test_a_file_is_not_written_over(tmp_path):
    for expected in ("bn.jsonl", "bn-1.jsonl", "bn-2.jsonl"):
        path = unused_file(tmp_path, "bn.jsonl")
        assert path == tmp_path / expected
        path.touch()
