"""Small, single, ordered and padded batches are told, and ordinary ones left in peace."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from auditing.faults.catalogue_batches import FAULTS, in_order, perceptron, sequence_network, sequences
from auditing.faults.digits_training import digits, fit, network
from torch import nn
from torch.utils.data import DataLoader

from bn_lightning import recalibrate_batch_norm
from bn_lightning.auditing import TrainingSettings, audit_batch_norm
from bn_lightning.layers import convert_batch_norm

SLUGS = tuple(FAULTS)


def of_rule(report, slug):
    return {finding.layer: finding for finding in report.findings if finding.rule == slug}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("slug", "severities"),
    [
        pytest.param("small-batch", {"2": "warning"}, id="small-batch"),
        pytest.param("single-value-batch", {"2": "error"}, id="single-value-batch"),
        pytest.param("ordered-batches", {"0.4": "warning"}, id="ordered-batches"),
        pytest.param("padding", {"1": "warning", "4": "warning"}, id="padding"),
    ],
)
def test_a_training_with_the_fault_is_found_at_its_layers(slug, severities):
    found = of_rule(FAULTS[slug](), slug)
    assert {name: finding.severity for name, finding in found.items()} == severities


@pytest.mark.parametrize("build", [network, perceptron, sequence_network], ids=lambda build: build.__name__)
def test_ordinary_batches_are_left_in_peace(build):
    batches = sequences(padded=False) if build is sequence_network else digits()
    if build is not sequence_network:  # a short last batch is no small batch
        batches = [*batches, tuple(part[:5] for part in batches[0])]
    model = build()
    fit(model, batches)
    training = TrainingSettings(batch_size=len(batches[0][1]), last_batch=5, accumulate_grad_batches=4)
    report = audit_batch_norm(model.eval(), batches, loss=F.cross_entropy, training=training)
    found = [(finding.rule, finding.severity) for finding in report.findings if finding.rule in SLUGS]
    assert [each for each in found if each[1] != "info"] == []


@pytest.mark.parametrize(
    ("size", "severity"), [(2, "warning"), (15, "warning"), (16, "info"), (31, "info"), (32, None)], ids=str
)
def test_values_per_channel_decide_with_data_and_without(size, severity):
    model, x = perceptron(), torch.randn(6 * size, 1, 8, 8, generator=seeded())
    recalibrate_batch_norm(model, [x])
    data = audit_batch_norm(model, x.split(size))
    static = audit_batch_norm(model, example_inputs=x[:2], training=TrainingSettings(batch_size=size))
    for report in (data, static):
        assert {f.severity for f in of_rule(report, "small-batch").values()} == ({severity} - {None})


def test_positions_count_as_values():
    model = network()
    report = audit_batch_norm(
        model, example_inputs=torch.randn(2, 1, 8, 8), training=TrainingSettings(batch_size=1, last_batch=1)
    )
    # 36 and 16 values an example; a single example is many values.
    assert {name: f.evidence["values_per_channel"] for name, f in of_rule(report, "small-batch").items()} == {"0.4": 16}
    assert not of_rule(report, "single-value-batch")


def test_the_true_batch_under_accumulation_is_stated():
    found = of_rule(FAULTS["small-batch"](), "small-batch")["2"]
    assert "4 examples, though an optimizer step sees 32 (accumulate_grad_batches=8)" in found.message


@pytest.mark.parametrize(
    ("kind", "options", "size", "normalized", "step"),
    [
        pytest.param("ghost", {"virtual_batch_size": 8}, 64, 8, 64 * 4 * 2, id="ghost"),
        pytest.param("cross_replica", {}, 4, 8, 4 * 4 * 2, id="cross-replica"),
        pytest.param("debiased", {}, 4, 4, 4 * 4 * 2, id="own-batch"),
    ],
)
@pytest.mark.parametrize("with_data", [True, False], ids="data={}".format)
def test_a_step_sees_all_groups_of_all_processes(kind, options, size, normalized, step, with_data):
    model, x = perceptron(), torch.randn(3 * size, 1, 8, 8, generator=seeded())
    convert_batch_norm(model, kind, **options)
    training = TrainingSettings(batch_size=size, accumulate_grad_batches=4, processes=2)
    batches = x.split(size) if with_data else None
    report = audit_batch_norm(model, batches, example_inputs=x[:2], training=training)
    found = of_rule(report, "small-batch")["2"]
    assert f"is {normalized} examples, though an optimizer step sees {step} " in found.message
    assert "(accumulate_grad_batches=4 in 2 processes)" in found.message


@pytest.mark.parametrize(("processes", "values"), [(1, 8), (2, 16), (4, None)], ids=str)
def test_processes_that_audit_together_are_those_that_normalize_together(monkeypatch, processes, values):
    monkeypatch.setattr("bn_lightning.auditing.audit.count_processes", lambda: processes)
    model, x = perceptron(), torch.randn(48, 1, 8, 8, generator=seeded())
    convert_batch_norm(model, "cross_replica")
    found = of_rule(audit_batch_norm(model, x.split(8)), "small-batch")
    assert {name: f.evidence["values_per_channel"] for name, f in found.items()} == ({"2": values} if values else {})


@pytest.mark.parametrize(
    ("kind", "options", "processes", "values"),
    [
        pytest.param("ghost", {"virtual_batch_size": 8}, 1, 8, id="ghost"),
        pytest.param("ghost", {"virtual_batch_size": 128}, 1, 64, id="ghost-larger-than-the-batch"),
        pytest.param("cross_replica", {}, 2, 128, id="cross-replica"),
        pytest.param("frozen", {}, 1, None, id="frozen"),
    ],
)
@pytest.mark.parametrize("size", [64, 4], ids="batch={}".format)
def test_a_variant_is_judged_by_the_group_it_normalizes(kind, options, processes, values, size):
    model = perceptron()
    convert_batch_norm(model, kind, **options)
    report = audit_batch_norm(
        model,
        example_inputs=torch.randn(2, 1, 8, 8, generator=seeded()),
        training=TrainingSettings(batch_size=size, processes=processes),
    )
    found = {name: f.evidence["values_per_channel"] for name, f in of_rule(report, "small-batch").items()}
    expected = None if values is None else min(values, size * processes)
    assert found == ({"2": expected} if expected is not None and expected < 32 else {})


@pytest.mark.parametrize(
    ("examples", "options", "layers"),
    [
        pytest.param(641, {}, ["bn"], id="one-left-over"),
        pytest.param(641, {"drop_last": True}, [], id="dropped"),
        pytest.param(642, {}, [], id="two-left-over"),
        pytest.param(640, {}, [], id="none-left-over"),
    ],
)
def test_a_last_batch_of_one_behind_those_looked_at(examples, options, layers):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.maps, self.bn = nn.BatchNorm2d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.bn(self.maps(x).mean((2, 3)))

    loader = DataLoader(torch.randn(examples, 3, 2, 2, generator=seeded()), 16, **options)
    for example in ({}, {"forward": lambda model, batch: model(batch)}):
        report = audit_batch_norm(Net(), loader, max_batches=4, **example)
        assert list(of_rule(report, "single-value-batch")) == layers


def test_a_last_batch_of_one_is_told_without_data():
    for last, expected in ((1, ["2"]), (2, []), (None, [])):
        report = audit_batch_norm(
            perceptron(), example_inputs=torch.randn(2, 1, 8, 8), training=TrainingSettings(64, last_batch=last)
        )
        assert list(of_rule(report, "single-value-batch")) == expected


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("batches", "size"), [(4, 4), (5, 64), (12, 2), (40, 16)], ids=str)
def test_shuffled_batches_are_not_accused(batches, size, seed):
    x, _ = (torch.cat(part) for part in zip(*digits(batches=28), strict=True))
    picked = x[torch.randperm(len(x), generator=seeded(seed))[: batches * size]]
    for model in (network(), perceptron()):
        assert not of_rule(audit_batch_norm(model, picked.split(size)), "ordered-batches")


def test_ordered_batches_of_unlike_size_and_their_evidence():
    x = torch.cat([x for x, _ in in_order()])
    found = of_rule(audit_batch_norm(perceptron(), [*x[:1000].split(50), x[1000:1007]]), "ordered-batches")["2"]
    assert found.evidence["variance_ratio"] > 3 * found.evidence["bound"]
    assert found.evidence["autocorrelation"] > 0.3
    assert found.evidence["batches"] == 21


def test_rows_of_sequences_are_no_examples():
    """Frames of a clip are alike: that they share a batch is no order of the batches."""

    class Frames(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(4)

        def forward(self, x):
            return self.bn(x.flatten(0, 1))

    clips = torch.randn(40, 1, 4, generator=seeded()) + 0.1 * torch.randn(40, 16, 4, generator=seeded(1))
    report = audit_batch_norm(Frames(), clips.split(4))
    assert not of_rule(report, "ordered-batches")


def rows_network(reached):
    """Build a BN over (N·L, C) rows."""

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(5)

        def forward(self, x):
            return self.bn(x.flatten(0, 1)[:reached])

    return Rows()


def padded_rows(seed, share=1.0, size=16, length=20):
    lengths = torch.randint(4, length + 1, (size,), generator=seeded(seed)) if share else torch.full((size,), length)
    x = torch.randn(size, length, 5, generator=seeded(seed + 100))
    return x * (torch.arange(length) < lengths[:, None])[..., None]


def test_padded_rows_are_told_and_recurring_ones_are_not():
    batches = [padded_rows(seed) for seed in range(4)]
    found = of_rule(audit_batch_norm(rows_network(None), batches), "padding")["bn"]
    truth = torch.cat(batches).flatten(0, 1).eq(0).all(1).double().mean()
    assert found.evidence["share"] == pytest.approx(float(truth))
    assert not of_rule(audit_batch_norm(rows_network(None), [padded_rows(s, 0.0) for s in range(4)]), "padding")
    # As many zero rows, but anywhere.
    shuffled = [
        x.flatten(0, 1)[torch.randperm(320, generator=seeded(seed))].view(16, 20, 5) for seed, x in enumerate(batches)
    ]
    assert not of_rule(audit_batch_norm(rows_network(None), shuffled), "padding")


def pixels_as_sequences(pad):
    """Read the pixels of each digit one after the other, with their dark margins and that much more of them."""
    return [F.pad(x.flatten(2), (0, pad), value=float(x.min())) for x, _ in digits(batches=6)]


@pytest.mark.parametrize(
    ("batches", "build"),
    [
        pytest.param(pixels_as_sequences(0), partial(nn.Conv1d, 1, 16, 3, padding=1), id="pixels-with-dark-margins"),
        pytest.param(pixels_as_sequences(20), partial(nn.Conv1d, 1, 16, 3, padding=1), id="a-margin-all-share"),
        pytest.param(
            [F.relu(torch.randn(16, 16, 30, generator=seeded(s))) for s in range(4)], nn.Identity, id="zeros-of-relu"
        ),
        pytest.param([torch.zeros(16, 16, 30) + s for s in range(4)], nn.Identity, id="constant-examples"),
    ],
)
def test_constant_stretches_that_are_no_padding(batches, build):
    torch.manual_seed(0)
    model = nn.Sequential(build(), nn.BatchNorm1d(16))
    assert not of_rule(audit_batch_norm(model, batches), "padding")


@pytest.mark.parametrize("side", ["left", "right"])
def test_share_of_padding_is_counted_on_either_side(side):
    lengths = torch.randint(6, 31, (64,), generator=seeded())
    lengths[5] = 30
    x = torch.randn(64, 4, 30, generator=seeded(1)) * (torch.arange(30) < lengths[:, None])[:, None]
    x = x.flip(2) if side == "left" else x
    found = of_rule(audit_batch_norm(nn.Sequential(nn.BatchNorm1d(4)), x.split(16)), "padding")["0"]
    # One zero alone cannot be told from a value.
    expected = sum(30 - int(length) for length in lengths if length < 29) / (64 * 30)
    assert found.evidence["share"] == pytest.approx(expected)
    assert found.evidence["longest"] == 30 - int(lengths.min())


def test_masked_layers_know_their_padding():
    model = sequence_network()
    convert_batch_norm(model, "masked", include=["1"])
    assert list(of_rule(audit_batch_norm(model, sequences()), "padding")) == ["4"]
