"""Which statistic is drawn how, and the depth profile."""

import io
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib import rc_context
from matplotlib.colors import to_rgb

from bn_lightning.errors import BatchNormError
from bn_lightning.functional.activation import activation_statistics
from bn_lightning.monitoring import ActivationHistory, ActivationSnapshot, RunningHistory, RunningSnapshot
from bn_lightning.monitoring.pictures import depth_profile
from bn_lightning.monitoring.running_snapshot import RunningRow
from bn_lightning.reports.heatmap import INFINITE, figure_image, figure_png
from bn_lightning.reports.labels import Labels

PINK = tuple(round(255 * part) for part in to_rgb(INFINITE))


def draw(rows, seed=0):
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed))


def snapshot(**layers):
    return ActivationSnapshot({name: activation_statistics(x) for name, x in layers.items()}, {})


@pytest.mark.parametrize(
    ("steps", "lines"),
    [
        pytest.param([*range(20), 50, 100, 150], [19.5], id="first steps, then every 50th"),
        pytest.param([0, 1, 2, 4, 8, 12], [2.5], id="one step in between"),
        pytest.param([0, 10, 20, 30], [], id="one distance"),
        pytest.param([0, 4], [], id="two samples"),
        pytest.param([7], [], id="one sample"),
    ],
)
def test_a_line_stands_where_the_distance_of_samples_changes(steps, lines):
    history = ActivationHistory()
    for step in steps:
        history.append(step, snapshot(fc=torch.ones(2, 2)))
    axes = history.figure().axes[0]
    assert [line.get_xdata()[0] for line in axes.lines] == lines
    assert ("at the line" in axes.get_xlabel()) == bool(lines)


@pytest.mark.parametrize(
    ("stat", "norm"),
    [
        *((stat, "LogNorm") for stat in ("std", "rms")),
        *((stat, "SymLogNorm") for stat in ("mean", "min", "max")),
        ("zero_fraction", "Normalize"),
    ],
)
def test_what_is_drawn_is_said_once_in_words(stat, norm):
    history = ActivationHistory()
    history.append(0, snapshot(small=1e-4 * draw(9), large=draw(9)))
    for figure in (history.figure(stat), snapshot(fc=draw(9) * torch.tensor([1.0, 1e-4, 1e-4])).figure(stat)):
        title = figure.get_suptitle()
        assert ("activation units" in title) == (stat != "zero_fraction")
        assert "_" not in title
        assert not figure.axes[1].texts
        assert type(figure.axes[0].images[0].norm).__name__ == norm


def test_figures_mark_nonfinite_layers():
    history = ActivationHistory()
    history.append(0, snapshot(good=torch.ones(2, 2), bad=torch.tensor([[torch.nan, 1.0]])))
    assert [text.get_text() for text in history.figure("mean").axes[1].texts] == ["■", "not finite"]


def running(*rows):
    history = RunningHistory()
    history.append(0, RunningSnapshot(rows, 0, {}, {}))
    return history


def legend(figure):
    return [text.get_text() for text in figure.axes[1].texts if text.get_text() != "■"]


@pytest.mark.parametrize("stat", ["drift", "noise"])
def test_running_statistics_are_drawn_in_sigma_on_a_logarithmic_scale(stat):
    rows = RunningRow("a", 4, drift=0.01, noise=0.02), RunningRow("b", 4, drift=1.0, noise=2.0), RunningRow("c", 4)
    figure = running(*rows).figure(stat)
    assert type(figure.axes[0].images[0].norm).__name__ == "LogNorm"
    assert figure.get_suptitle().endswith("σ")
    assert legend(figure) == ["no value"]


def test_running_statistics_that_were_nonfinite_are_marked():
    rows = RunningRow("a", 4, drift=0.5, noise=0.5, dead_share=0.1, spoiled_steps=1), RunningRow("b", 4, drift=1.0)
    history = running(*rows)
    assert legend(history.figure("drift")) == ["not finite"]
    assert legend(history.figure("dead")) == ["no value"]


@pytest.mark.parametrize("stat", ["zero_fraction", "dead_fraction"])
def test_shares_are_drawn_from_0_to_1(stat):
    history = ActivationHistory()
    history.append(0, snapshot(a=draw(9).relu(), b=torch.zeros(2, 3)))
    norm = history.figure(stat).axes[0].images[0].norm
    assert (norm.vmin, norm.vmax) == (0.0, 1.0)


def test_a_merged_history_says_for_how_many_samples_a_column_stands():
    history = ActivationHistory(most_columns=4)
    labels = []
    for step in range(9):
        history.append(step, snapshot(fc=torch.ones(2, 2)))
        labels.append(history.figure().axes[0].get_xlabel())
    assert "one column a sample" in labels[3]
    assert "one column for 2 samples" in labels[4]
    assert "one column for 4 samples" in labels[8]


@pytest.mark.parametrize("history", [ActivationHistory(), RunningHistory()], ids=lambda each: type(each).__name__)
def test_an_unknown_statistic_is_refused_with_those_there_are(history):
    with pytest.raises(BatchNormError, match=", ".join(history.maps)):
        history.figure("kurtosis")


def test_gradients_are_called_so():
    sample = replace(snapshot(fc=draw(9)), kind="gradients")
    history = ActivationHistory()
    history.append(0, sample)
    for figure in (history.figure("std"), sample.figure("std")):
        assert "gradient" in figure.get_suptitle()
        assert figure.get_suptitle().endswith("loss per activation unit")
    assert "gradient" in depth_profile(sample).get_suptitle()


def line(axes, label):
    (found,) = [line for line in axes.lines if line.get_label() == label]
    return found.get_ydata()


def test_a_profile_shows_mean_and_standard_deviation_of_each_layer():
    outputs = {name: draw(200, seed) * scale + scale for seed, (name, scale) in enumerate({"a": 1.0, "b": 3.0}.items())}
    outputs["relu"] = outputs["b"].relu()
    figure = depth_profile(snapshot(**outputs))
    upper, lower, zeros = figure.axes
    data = [x.double().numpy() for x in outputs.values()]
    np.testing.assert_allclose(line(upper, "mean"), [x.mean() for x in data], rtol=1e-5)
    np.testing.assert_allclose(lower.lines[0].get_ydata(), [x.std() for x in data], rtol=1e-5)
    band = upper.collections[0].get_paths()[0].vertices
    for index, x in enumerate(data):
        heights = band[np.isclose(band[:, 0], index), 1]
        np.testing.assert_allclose((heights.min(), heights.max()), (x.mean() - x.std(), x.mean() + x.std()), rtol=1e-5)
    (steps,) = zeros.patches
    np.testing.assert_allclose(steps.get_data().values, [(x == 0).mean() for x in data], rtol=1e-5)
    assert lower.get_yscale() == "log"
    assert zeros.get_ylim() == (0, 1)


def test_a_profile_leaves_out_layers_without_values():
    sample = replace(snapshot(a=draw(9), never=draw(0), b=draw(9)), absent=frozenset(["never"]))
    (labels,) = depth_profile(sample).findobj(Labels)
    assert labels.names == ["a", "b"]
    with pytest.raises(BatchNormError, match="none of the 1 watched layers"):
        depth_profile(snapshot(never=draw(0)))


def test_a_profile_marks_nonfinite_layers_and_names_the_first():
    bad = torch.tensor([[torch.nan, 1.0]])
    figure = depth_profile(snapshot(a=draw(9), b=bad, c=draw(9), d=bad))
    assert figure.axes[0].get_legend().get_texts()[-1].get_text() == "not finite, first b"
    pixels = figure_image(figure)
    for axes in figure.axes[:2]:
        x, y = axes.transAxes.transform([(0.5 / 4, 0.9), (1.5 / 4, 0.9)]).round().astype(int).T
        assert tuple(pixels[len(pixels) - 1 - y[1], x[1]]) == PINK
        assert tuple(pixels[len(pixels) - 1 - y[0], x[0]]) != PINK
    assert len(depth_profile(snapshot(a=draw(9))).axes[0].get_legend().get_texts()) == 2


def test_a_profile_shows_another_sample_of_the_same_layers():
    now = replace(snapshot(a=draw(9), b=draw(9, 1)), step=150)
    before = replace(snapshot(b=draw(9, 2), gone=draw(9)), step=0)
    figure = depth_profile(now, before)
    np.testing.assert_allclose(line(figure.axes[0], "step 0"), [np.nan, draw(9, 2).double().mean()], rtol=1e-5)
    assert "step 150" in figure.get_suptitle()


def test_a_constant_layer_has_a_mark_of_its_own():
    upper, lower, _ = depth_profile(snapshot(a=draw(9), dead=torch.zeros(4, 2))).axes
    assert [found.get_xdata().tolist() for found in lower.lines if found.get_marker() == "v"] == [[1]]
    assert "0" in lower.get_ylabel()
    assert upper.get_yscale() == "linear"


def test_a_profile_of_very_different_layers_is_logarithmic_on_both_sides():
    upper, *_ = depth_profile(snapshot(a=draw(9) * 1e-3, b=draw(9) * 1e3)).axes
    assert upper.get_yscale() == "symlog"
    texts = [label.get_text() for label in upper.get_yticklabels()]
    assert "0" in texts
    assert len(texts) == len(set(texts))


def test_means_near_0_make_no_profile_logarithmic():
    centred = draw(500) - draw(500).mean(0)
    upper, *_ = depth_profile(snapshot(a=centred, b=draw(500, 1)), snapshot(a=draw(500, 2), b=centred)).axes
    assert upper.get_yscale() == "linear"


@pytest.mark.parametrize("layers", [1, 10, 60, 300])
def test_the_names_below_a_profile_can_be_read(layers):
    figure = depth_profile(snapshot(**{f"stage{index}.conv": draw(9, index) for index in range(layers)}))
    (labels,) = figure.findobj(Labels)
    assert len(labels.names) == layers if layers <= 60 else 40 < len(labels.names) < 100
    pixels, box = figure_image(figure), figure.axes[1].bbox
    below = pixels[len(pixels) - round(box.y0) + 6 :, round(box.x0) - 6 : round(box.x1) + 6]
    inked = below.min(axis=(0, 2)) < 128
    starts = np.flatnonzero(np.diff(inked.astype(int), prepend=0) == 1)
    assert len(starts) == len(labels.names)  # no name touches the next
    distance = box.width / layers * (1 if layers <= 60 else labels.places[1])
    np.testing.assert_allclose(np.diff(starts), distance, atol=2)
    assert len(figure_png(figure)) < 100 * 1024


def test_a_profile_saved_as_text_has_the_names_as_text():
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none"}):
        depth_profile(snapshot(**{"stem.conv": draw(9), "head.fc": draw(9)})).savefig(file, format="svg")
    assert re.findall(">(stem.conv|head.fc)<", file.getvalue()) == ["stem.conv", "head.fc"]


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(torch.zeros(4, 2), id="zeros"),
        pytest.param(torch.tensor([[torch.nan]]), id="nan"),
        pytest.param(torch.tensor([[torch.inf, 1.0]]), id="inf"),
        pytest.param(torch.tensor([[1e-30, 1e30]]), id="60 decades"),
    ],
)
def test_awkward_profiles_are_drawn(x):
    assert figure_image(depth_profile(snapshot(only=x))).std() > 0


def test_small_numbers_leave_the_labels_of_a_profile_on_the_page():
    values = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)) * 9.01e-6
    blocks = {f"layer{index}": activation_statistics(values * (index + 1)) for index in range(3)}
    figure = depth_profile(ActivationSnapshot(blocks, {}, kind="gradients"))
    figure.canvas.draw()
    labels = [axes.yaxis.label for axes in figure.axes]
    assert min(label.get_window_extent().x0 for label in labels if label.get_text()) > 0
