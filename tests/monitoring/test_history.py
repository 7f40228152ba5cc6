"""The layer × step history, its merging, and when samples are due."""

import json

import numpy as np
import pytest
import torch

from bn_lightning.errors import BatchNormError
from bn_lightning.functional.activation import activation_statistics
from bn_lightning.monitoring import (
    ActivationHistory,
    ActivationSnapshot,
    Cadence,
    GrowingInterval,
    RunningHistory,
    RunningSnapshot,
)
from bn_lightning.monitoring.running_snapshot import RunningRow


def samples(steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 9, (steps,), generator=generator).tolist()  # unequal
    outputs = [(5 + step + torch.randn(n, 3, generator=generator)).relu() for step, n in enumerate(sizes)]
    return [x * (torch.arange(3) >= step % 3) for step, x in enumerate(outputs)]  # up to two dead channels


def snapshot(**layers):
    return ActivationSnapshot({name: activation_statistics(x) for name, x in layers.items()}, {})


@pytest.mark.parametrize("steps", [1, 7, 8, 9, 16, 17, 33, 100], ids="{} samples".format)
@pytest.mark.parametrize("most_columns", [8, 7], ids="at most {}".format)
@pytest.mark.parametrize("halves", [False, True], ids=["one sample a step", "two samples a step"])
def test_merged_columns_equal_numpy_on_their_samples(steps, most_columns, halves):
    history, data = ActivationHistory(most_columns), samples(steps)

    def parts(x):
        return x.chunk(2) if halves else (x,)

    for step, x in enumerate(data):
        for part in parts(x):
            history.append(3 * step, snapshot(fc=part))
    assert len(history.steps) <= most_columns
    first = [step // 3 for step in history.steps]
    for column, (start, stop) in enumerate(zip(first, [*first[1:], steps], strict=True)):
        x = torch.cat(data[start:stop]).double().numpy()
        for stat, expected in {"mean": x.mean(), "std": x.std(), "min": x.min(), "max": x.max()}.items():
            np.testing.assert_allclose(history.values(stat)[0, column], expected, rtol=1e-6, err_msg=stat)
        assert history.values("zero_fraction")[0, column] == (x == 0).mean()
        shares = [(part.double().numpy() == 0).all(0).mean() for each in data[start:stop] for part in parts(each)]
        weights = [part.numel() for each in data[start:stop] for part in parts(each)]
        np.testing.assert_allclose(
            history.values("dead_fraction")[0, column], np.average(shares, weights=weights), rtol=1e-12
        )
    widths = np.diff([*first, steps])
    assert len(set(widths[:-1])) <= 1  # every full column stands for as many samples
    assert history.samples == widths.tolist()


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


def reading(step, **drift_noise_dead):
    rows = tuple(
        RunningRow(name, 4, updates=1.0, drift=drift, noise=noise, dead_share=dead, spoiled_steps=spoiled)
        for name, (drift, noise, dead, spoiled) in drift_noise_dead.items()
    )
    return RunningSnapshot(rows, step, {}, {})


def random_readings(steps):
    """(steps, layers, drift, noise, dead, spoiled steps), of which a third is unknown."""
    generator = np.random.default_rng(0)
    values = generator.random((steps, 2, 4))
    values[generator.random(values.shape) < 1 / 3] = np.nan
    values[..., 3] = generator.integers(0, 3, (steps, 2))
    return values


def rows_of(values):
    return [(*(None if np.isnan(v) else v for v in row[:3]), int(row[3])) for row in values]


@pytest.mark.parametrize("steps", [1, 7, 8, 9, 17, 100], ids="{} readings".format)
def test_a_merged_column_shows_the_largest_known_reading(steps):
    history, data = RunningHistory(most_columns=8), random_readings(steps)
    for step, values in enumerate(data):
        history.append(step, reading(step, **dict(zip(("bn1", "bn2"), rows_of(values), strict=True))))
    assert history.layers == ["bn1", "bn2"]
    assert sum(history.samples) == steps
    for column, start in enumerate(history.steps):
        part = data[start : start + history.samples[column]]
        expected = np.where(np.isnan(part).all(0), np.nan, np.nan_to_num(part, nan=-np.inf).max(0))
        found = np.stack([history.values(stat)[:, column] for stat in ("drift", "noise", "dead", "spoiled_steps")], 1)
        np.testing.assert_array_equal(found, expected)


def test_a_restored_history_of_running_statistics_goes_on_as_if_never_stopped(tmp_path):
    whole, first, second = (RunningHistory(most_columns=8) for _ in range(3))
    for step, values in enumerate(random_readings(37)):
        sample = reading(step, **dict(zip(("bn1", "bn2"), rows_of(values), strict=True)))
        whole.append(step, sample)
        (first if step < 21 else second).append(step, sample)
        if step == 20:
            torch.save(first.state_dict(), tmp_path / "state.pt")
            second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (second.steps, second.layers, second.last_step) == (whole.steps, whole.layers, 36)
    for stat in RunningHistory.maps:
        torch.testing.assert_close(second.values(stat), whole.values(stat), rtol=0, atol=0, equal_nan=True)


def strict_lines(path):
    """Lines of JSON that has no NaN or Infinity."""

    def refuse(constant):
        raise AssertionError(constant)

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_activations_as_json_lines(tmp_path):
    history, data = ActivationHistory(most_columns=4), samples(7)
    for step, x in enumerate(data):
        layers = {"fc": x} if step < 4 else {"fc": x, "späť": torch.tensor([[1.0, torch.nan], [torch.inf, 0.0]])}
        history.append(10 * step, snapshot(**layers))
    history.write_jsonl(tmp_path / "run" / "activations.jsonl")
    lines = strict_lines(tmp_path / "run" / "activations.jsonl")
    assert [(line["step"], line["samples"]) for line in lines] == [(0, 2), (20, 2), (40, 2), (60, 1)]
    assert [list(line["layers"]) for line in lines] == [["fc"], ["fc"], ["fc", "späť"], ["fc", "späť"]]
    x = torch.cat(data[2:4]).double().numpy()
    found = lines[1]["layers"]["fc"]
    assert found["count"] == x.size
    assert found["mean"] == float(f"{x.mean():.6g}")
    assert found["std"] == pytest.approx(x.std(), rel=1e-5)
    assert found["zero_fraction"] == pytest.approx((x == 0).mean(), rel=1e-5)
    assert len(str(found["mean"]).replace(".", "").lstrip("0")) <= 6
    spoiled = lines[3]["layers"]["späť"]
    assert (spoiled["nonfinite"], spoiled["mean"], spoiled["zero_fraction"]) == (2, "nan", 0.25)
    assert (spoiled["count"], type(spoiled["count"])) == (4, int)


def test_running_statistics_as_json_lines(tmp_path):
    history = RunningHistory()
    history.append(3, reading(3, bn1=(0.123456789, None, 0.5, 0), bn2=(None, None, None, 0), bn3=(None, None, None, 2)))
    history.write_jsonl(tmp_path / "bn.jsonl")
    assert strict_lines(tmp_path / "bn.jsonl") == [
        {
            "step": 3,
            "samples": 1,
            "layers": {
                "bn1": {"drift": 0.123457, "noise": None, "dead": 0.5, "spoiled_steps": 0},
                "bn3": {"drift": None, "noise": None, "dead": None, "spoiled_steps": 2},
            },
        }
    ]


@pytest.mark.parametrize("history", [ActivationHistory(), RunningHistory()], ids=lambda each: type(each).__name__)
def test_an_empty_history_is_an_empty_file(history, tmp_path):
    history.write_jsonl(tmp_path / "empty.jsonl")
    assert (tmp_path / "empty.jsonl").read_bytes() == b""


def test_an_interrupted_file_of_json_lines_leaves_the_old_one(tmp_path, monkeypatch):
    history, path = ActivationHistory(), tmp_path / "a.jsonl"
    for step in range(3):
        history.append(step, snapshot(fc=torch.ones(2, 2)))
    history.write_jsonl(path)
    before, calls = path.read_bytes(), iter([None])

    def interrupted(*args, **options):
        if next(calls, 1):
            raise KeyboardInterrupt
        return "{}"

    monkeypatch.setattr(json, "dumps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        history.write_jsonl(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_an_empty_history_says_so():
    with pytest.raises(BatchNormError, match="nothing was sampled"):
        ActivationHistory().figure()


def test_a_history_without_layers_says_so():
    history = ActivationHistory()
    history.append(0, snapshot())
    with pytest.raises(BatchNormError, match="nothing to draw"):
        history.figure()


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
    redraw = GrowingInterval(first=100, seconds=0)
    assert len([step for step in range(0, 1_000_000, 50) if redraw.is_due(step)]) == 23


def test_pictures_wait_a_minute_and_what_they_cost():
    now = [0.0]
    redraw = GrowingInterval(first=1, clock=lambda: now[0])
    drawn = []
    for step in range(1, 2000):  # a step a second
        now[0] = float(step)
        if redraw.is_due(step):
            drawn.append(step)
            now[0] += 0.1 if step < 200 else 0.75
            redraw.took()
    # A minute after the first, half as many steps, and 500 times 0.75 s.
    assert drawn == [1, 61, 121, 182, 273, 648, 1023, 1535]
