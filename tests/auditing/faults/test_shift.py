"""Evaluation inputs that differ and inputs in different units are told, and ordinary ones left in peace."""

import pytest
import torch
import torch.nn.functional as F
from auditing.faults.catalogue_batches import perceptron
from auditing.faults.catalogue_shift import FAULTS, in_other_units, unseen
from auditing.faults.digits_training import digits, fit, network
from sklearn.datasets import load_breast_cancer, load_wine
from torch import nn

from bn_lightning.auditing import audit_batch_norm


def of_rule(report, slug):
    return {finding.layer: finding for finding in report.findings if finding.rule == slug}


@pytest.mark.parametrize(
    ("slug", "severities"),
    [
        pytest.param("evaluation-shift", {"0.1": "warning"}, id="evaluation-shift"),
        pytest.param("unstandardized-input", {None: "warning"}, id="unstandardized-input"),
    ],
)
def test_a_training_with_the_fault_is_found_at_its_layers(slug, severities):
    found = of_rule(FAULTS[slug](), slug)
    assert {name: finding.severity for name, finding in found.items()} == severities


@pytest.mark.parametrize("build", [network, perceptron], ids=lambda build: build.__name__)
@pytest.mark.parametrize("size", [1, 8, 64], ids="examples={}".format)
def test_a_held_out_part_of_the_same_data_is_left_in_peace(build, size):
    model = build()
    fit(model, digits())
    # Of few examples any statistics are far off: that is no shift.
    val = [(x[:size], y[:size]) for x, y in unseen()][: 1 if size < 64 else None]
    if size == 1:
        val = (
            [(x[:1], y[:1]) for x, y in unseen()[:2]] if build is network else [(x[:2], y[:2]) for x, y in unseen()[:1]]
        )
    report = audit_batch_norm(model.eval(), digits(), val_batches=val, loss=F.cross_entropy)
    assert not of_rule(report, "evaluation-shift")
    assert not of_rule(report, "unstandardized-input")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param(lambda x: x + 1.0, True, id="brighter"),
        pytest.param(lambda x: 3.0 * x, True, id="contrast"),
        pytest.param(lambda x: x + 0.02, False, id="a-trace-brighter"),
        pytest.param(lambda x: x.flip(3), False, id="mirrored"),
    ],
)
@pytest.mark.parametrize("losses", [True, False], ids="losses={}".format)
def test_what_is_a_shift(change, expected, losses):
    model = network()
    val = [(change(x), y) for x, y in unseen()]
    report = audit_batch_norm(model, digits(), val_batches=val, loss=F.cross_entropy if losses else None)
    assert bool(of_rule(report, "evaluation-shift")) == expected


@pytest.mark.parametrize("seed", range(3), ids="seed={}".format)
@pytest.mark.parametrize("tail", ["lognormal", "student-4"])
def test_heavy_tails_drawn_alike_are_no_shift(tail, seed):
    """One example may make most of a variance, of which another draw then knows nothing."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2560, 12, generator=generator)
    if tail == "lognormal":
        x = torch.exp(1.5 * x)
    else:
        x = x / torch.randn(2560, 12, 4, generator=generator).square().mean(2).sqrt()
    model, train, val = nn.Sequential(nn.BatchNorm1d(12)), x[:2048].split(64), x[2048:]
    assert not of_rule(audit_batch_norm(model, train, val_batches=val.split(64)), "evaluation-shift")
    for shifted in (10 * val, val + 3 * x.std(0)):
        assert of_rule(audit_batch_norm(model, train, val_batches=shifted.split(64)), "evaluation-shift")


@pytest.mark.parametrize("shape", [(), (4, 4)], ids=["tables", "pictures"])
def test_standard_error_is_how_far_random_draws_are_apart(shape, monkeypatch):
    """The RMS distance of two draws is what each of them tells as its error, for tails that are not normal."""
    monkeypatch.setattr("bn_lightning.auditing.rules.shift._SHIFT", 0.0)
    monkeypatch.setattr("bn_lightning.auditing.rules.shift._ERRORS", 0.0)
    gaps = errors = 0.0
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(384, 50, *shape, generator=generator)
        x = x.sign() * x.abs() ** 1.5 + torch.randn(384, 50, *(1 for _ in shape), generator=generator)
        model = nn.Sequential(nn.BatchNorm2d(50) if shape else nn.BatchNorm1d(50))
        report = audit_batch_norm(model, x[:256].split(32), val_batches=x[256:].split(32))
        evidence = of_rule(report, "evaluation-shift")["0"].evidence
        gaps += evidence["gap"] ** 2
        errors += evidence["standard_error"] ** 2
    assert errors == pytest.approx(gaps, rel=0.15)


def with_input_norm():
    """Build the network behind a BN of its own, to which the place of a pixel is nothing; the next BN is ``1.1``."""
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm2d(1), *network())


@pytest.mark.parametrize(
    ("change", "losses", "expected"),
    [
        pytest.param(lambda x: x.transpose(2, 3), True, ["1.1"], id="transposed"),
        pytest.param(lambda x: x.transpose(2, 3), False, [], id="transposed-without-a-loss"),
        pytest.param(lambda x: x, True, [], id="the-same"),
        pytest.param(lambda x: x + 1.0, True, ["0"], id="brighter"),
    ],
)
def test_a_shift_that_only_deeper_layers_and_the_loss_see(change, losses, expected):
    model = with_input_norm()
    fit(model, digits())
    val = [(change(x), y) for x, y in unseen()]
    report = audit_batch_norm(model.eval(), digits(), val_batches=val, loss=F.cross_entropy if losses else None)
    assert list(of_rule(report, "evaluation-shift")) == expected


@pytest.mark.parametrize("size", [2, 8], ids="examples={}".format)
def test_few_unseen_examples_are_no_shift_of_deeper_layers(size):
    model = with_input_norm()
    fit(model, digits())
    for number in range(4):
        x, y = unseen()[number]
        report = audit_batch_norm(model.eval(), digits(), val_batches=[(x[:size], y[:size])], loss=F.cross_entropy)
        assert not of_rule(report, "evaluation-shift")


@pytest.mark.parametrize("digit", [0, 1, 7], ids=str)
def test_deeper_layers_that_differ_to_no_harm_are_no_shift(digit):
    """Evaluation of one class looks different to deeper layers, whose statistics of training are the better ones."""
    model = with_input_norm()
    fit(model, digits())
    x, y = (torch.cat(part) for part in zip(*unseen(), strict=True))
    val = list(zip(x[y == digit].split(8), y[y == digit].split(8), strict=True))
    report = audit_batch_norm(model.eval(), digits(), val_batches=val, loss=F.cross_entropy)
    assert report.losses.difference("domain shift").mean < 0
    assert not of_rule(report, "evaluation-shift")


@pytest.mark.parametrize("examples", [4, 8], ids="examples=4x{}".format)
def test_a_network_that_knows_its_training_data_by_heart_is_no_shift(examples):
    model, few = with_input_norm(), [(x[:examples], y[:examples]) for x, y in digits()[:4]]
    fit(model, few * 60)
    report = audit_batch_norm(model.eval(), few, val_batches=unseen(), loss=F.cross_entropy)
    assert report.losses.recalibrated.mean > 2 * audit_batch_norm(model, few, loss=F.cross_entropy).losses.deployed.mean
    assert not of_rule(report, "evaluation-shift")


def linear(features):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(features, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))


def tables(load, standardized):
    x = torch.as_tensor(load().data, dtype=torch.float32)
    return ((x - x.mean(0)) / x.std(0) if standardized else x).split(64)


@pytest.mark.parametrize("load", [load_wine, load_breast_cancer], ids=lambda load: load.__name__)
def test_real_tables_need_standardizing(load):
    raw, standardized = tables(load, False), tables(load, True)
    assert of_rule(audit_batch_norm(linear(raw[0].shape[1]), raw), "unstandardized-input")
    assert not of_rule(audit_batch_norm(linear(raw[0].shape[1]), standardized), "unstandardized-input")


def test_a_norm_before_the_first_weights_sees_to_it():
    inputs = [x.flatten(1) for x, _ in in_other_units()]
    torch.manual_seed(0)
    first = nn.Sequential(nn.BatchNorm1d(64), nn.Linear(64, 10))
    assert not of_rule(audit_batch_norm(first, inputs), "unstandardized-input")
    later = nn.Sequential(nn.Linear(64, 10), nn.BatchNorm1d(10))
    assert of_rule(audit_batch_norm(later, inputs), "unstandardized-input")


@pytest.mark.parametrize(
    ("scales", "offset", "expected"),
    [
        pytest.param((1.0, 1.0, 1.0), 0.0, False, id="standardized"),
        pytest.param((60.0, 60.0, 60.0), 120.0, False, id="pixels-from-0-to-255"),
        pytest.param((0.23, 0.22, 0.22), 0.45, False, id="pixels-from-0-to-1"),
        pytest.param((1.0, 1.0, 30.0), 0.0, True, id="one-channel-in-other-units"),
        pytest.param((1.0, 1.0, 0.0), 0.0, False, id="one-channel-constant"),
        pytest.param((1.0, 1.0, 1.0), 300.0, True, id="kelvin"),
    ],
)
def test_channels_of_pictures(scales, offset, expected):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    noise = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    x = noise * torch.tensor(scales).view(3, 1, 1) + offset
    assert bool(of_rule(audit_batch_norm(model, x.split(16)), "unstandardized-input")) == expected


def test_rare_binary_features_are_in_no_other_units():
    rates = torch.logspace(-3, -0.3, 40)
    x = (torch.rand(2048, 40, generator=torch.Generator().manual_seed(0)) < rates).float()
    assert not of_rule(audit_batch_norm(linear(40), x.split(64)), "unstandardized-input")


@pytest.mark.parametrize(
    ("columns", "factor", "expected"),
    [(1, 1000.0, True), (2, 1000.0, True), (1, 10.0, False), (1, 0.001, False), (0, 1.0, False)],
    ids=str,
)
def test_a_few_columns_of_many_in_other_units(columns, factor, expected):
    x = torch.randn(512, 20, generator=torch.Generator().manual_seed(0))
    x[:, 7 : 7 + columns] *= factor
    found = of_rule(audit_batch_norm(linear(20), x.split(32)), "unstandardized-input")
    assert bool(found) == expected
    if found:
        assert "feature 7" in found[None].message or "feature 8" in found[None].message
        assert found[None].evidence["ratio"] == pytest.approx(1000, rel=0.3)


@pytest.mark.parametrize("kind", ["one-hot", "word-counts", "heavy-tails"])
def test_sparse_and_heavy_tailed_columns_are_in_no_other_units(kind):
    generator = torch.Generator().manual_seed(0)
    if kind == "one-hot":
        x = (torch.rand(2048, 50, generator=generator) < torch.logspace(-3, -0.3, 50)).float()
    elif kind == "word-counts":
        x = torch.poisson(torch.logspace(-2.5, 0.7, 50).expand(2048, 50).contiguous(), generator=generator)
    else:
        x = torch.exp(1.5 * torch.randn(2048, 50, generator=generator))
    found = of_rule(audit_batch_norm(linear(50), x.split(64)), "unstandardized-input")
    assert not found
