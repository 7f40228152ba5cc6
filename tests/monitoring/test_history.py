"""The layer × step history, its merging, and when samples are due."""

import numpy as np
import pytest
import torch

from bn_lightning.errors import BatchNormError
from bn_lightning.functional.activation import activation_statistics
from bn_lightning.monitoring import ActivationHistory, ActivationSnapshot, Cadence, GrowingInterval


def samples(steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 9, (steps,), generator=generator).tolist()  # unequal
    return [(5 + step + torch.randn(n, 3, generator=generator)).relu() for step, n in enumerate(sizes)]


def draw(rows, seed=0):
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed))


def snapshot(**layers):
    return ActivationSnapshot({name: activation_statistics(x) for name, x in layers.items()}, {})


@pytest.mark.parametrize("steps", [1, 7, 8, 9, 16, 17, 33, 100], ids="{} samples".format)
@pytest.mark.parametrize("most_columns", [8, 7], ids="at most {}".format)
@pytest.mark.parametrize("halves", [False, True], ids=["one sample a step", "two samples a step"])
def test_merged_columns_equal_numpy_on_their_samples(steps, most_columns, halves):
    history, data = ActivationHistory(most_columns), samples(steps)
    for step, x in enumerate(data):
        for part in x.chunk(2) if halves else (x,):
            history.append(3 * step, snapshot(fc=part))
    assert len(history.steps) <= most_columns
    first = [step // 3 for step in history.steps]
    for column, (start, stop) in enumerate(zip(first, [*first[1:], steps], strict=True)):
        x = torch.cat(data[start:stop]).double().numpy()
        for stat, expected in {"mean": x.mean(), "std": x.std(), "min": x.min(), "max": x.max()}.items():
            np.testing.assert_allclose(history.values(stat)[0, column], expected, rtol=1e-6, err_msg=stat)
        assert history.values("zero_fraction")[0, column] == (x == 0).mean()
    widths = np.diff([*first, steps])
    assert len(set(widths[:-1])) <= 1  # every full column stands for as many samples


def test_two_samples_of_one_step_are_one_column():
    history, (one, two) = ActivationHistory(), samples(2)
    for step, x in ((4, one), (4, two), (5, one)):
        history.append(step, snapshot(fc=x))
    assert history.steps == [4, 5]
    np.testing.assert_allclose(history.values("mean")[0, 0], torch.cat([one, two]).double().mean(), rtol=1e-6)


def test_layers_may_come_and_go():
    history, (x, y) = ActivationHistory(), samples(2)
    history.append(0, snapshot(a=x))
    history.append(1, snapshot(b=y, a=x))
    history.append(2, snapshot(b=y))
    assert history.layers == ["a", "b"]
    assert history.values("mean").isnan().tolist() == [[False, False, True], [True, False, False]]


def test_a_restored_history_goes_on_as_if_never_stopped(tmp_path):
    whole, first, second = (ActivationHistory(most_columns=8) for _ in range(3))
    for step, x in enumerate(samples(37)):
        whole.append(step, snapshot(fc=x))
        (first if step < 21 else second).append(step, snapshot(fc=x))
        if step == 20:
            torch.save(first.state_dict(), tmp_path / "state.pt")
            second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.steps == whole.steps
    torch.testing.assert_close(second.values("std"), whole.values("std"), rtol=0, atol=0)


def test_an_empty_history_says_so():
    with pytest.raises(BatchNormError, match="nothing was sampled"):
        ActivationHistory().figure()


def test_a_history_without_layers_says_so():
    history = ActivationHistory()
    history.append(0, snapshot())
    with pytest.raises(BatchNormError, match="nothing to draw"):
        history.figure()


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


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({"every_n_steps": 4, "first_steps": 3}, [0, 1, 2, 4, 8], id="both"),
        pytest.param({"every_n_steps": 5, "first_steps": 0}, [0, 5, 10], id="period only"),
        pytest.param({"every_n_steps": 1}, list(range(12)), id="every step"),
    ],
)
def test_cadence(options, expected):
    assert [step for step in range(12) if Cadence(**options).is_due(step)] == expected


@pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"first_steps": -1}], ids=str)
def test_cadence_refuses_what_makes_no_sense(options):
    with pytest.raises(BatchNormError, match=next(iter(options))):
        Cadence(**options)


def test_pictures_are_drawn_ever_more_rarely():
    redraw = GrowingInterval(first=100)
    assert len([step for step in range(0, 1_000_000, 50) if redraw.is_due(step)]) == 23
