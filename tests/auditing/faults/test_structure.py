"""Decay on γ and β, biases that a BN takes away, and dropout before a BN; each only where it really is."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from auditing.faults.catalogue_structure import FAULTS
from auditing.faults.digits_training import digits, network
from torch import nn

from bn_lightning import convert_batch_norm
from bn_lightning.auditing import RULES, AuditReading, audit_batch_norm
from bn_lightning.auditing.observers import Observations
from bn_lightning.auditing.reading import read_layer
from bn_lightning.modules import decay_groups
from bn_lightning.selection import named_batch_norms
from bn_lightning.tracing import record_forward

IMAGES = torch.zeros(2, 3, 8, 8)


def of_rule(report, slug):
    return {finding.layer: finding for finding in report.findings if finding.rule == slug}


def static(model, slug, x=IMAGES, **given):
    return of_rule(audit_batch_norm(model, example_inputs=x, **given), slug)


@pytest.mark.parametrize(
    ("slug", "layer"), [("decayed-affine", None), ("redundant-bias", None), ("dropout-before-norm", "0.5")]
)
def test_a_training_with_the_fault_is_found_at_its_layers(slug, layer):
    assert set(of_rule(FAULTS[slug](), slug)) == {layer}


def test_decay_is_one_note_with_its_parameters():
    model = network()
    model[0][1].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.05)
    found = static(model, "decayed-affine", digits()[0][0], optimizer=optimizer)
    assert list(found) == [None]
    assert found[None].severity == "info"
    assert found[None].evidence == {"layers": 2, "parameters": 8 + 16 + 16, "weight_decay": 0.05}
    kind = torch.optim.AdamW(decay_groups(model, 0.05), lr=0.1)
    assert not static(model, "decayed-affine", digits()[0][0], optimizer=kind)
    assert not static(model, "decayed-affine", digits()[0][0], optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    unknown = audit_batch_norm(model)
    assert "decayed-affine" in {each.what for each in unknown.not_looked}


class Biased(nn.Module):
    """Ways in which a bias stands before a BN, or only seems to."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.conv, self.bn, self.other = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.linear, self.bn1 = nn.Linear(4, 5), nn.BatchNorm1d(5)

    def forward(self, x):
        y = self.conv(x)
        if self.way == "two-norms":
            return self.bn(y) + self.other(y)
        if self.way == "skip":
            return self.bn(y) + y
        if self.way == "returned":
            return self.bn(y), y
        if self.way == "relu-between":
            return self.bn(F.relu(y))
        if self.way == "shared-conv":
            return self.bn(y), self.conv(x[..., 1:, 1:]).relu()
        if self.way == "linear":
            return self.bn1(self.linear(y.mean((2, 3))))
        if self.way == "linear-over-length":  # (N, L, C): the BN's channels are not the linear's
            return self.bn1(self.linear(y.mean(2).transpose(1, 2)[:, :5]))
        if self.way == "bias-read":
            return self.bn(y) + self.conv.bias.view(1, -1, 1, 1)
        return self.bn(y)


@pytest.mark.parametrize(
    ("way", "parameters"),
    [
        ("plain", 4),
        ("two-norms", 4),
        ("skip", None),
        ("returned", None),
        ("relu-between", None),
        ("shared-conv", None),
        ("linear", 5),
        ("linear-over-length", None),
        ("bias-read", None),
    ],
)
def test_a_bias_is_redundant_where_nothing_but_norms_read_it(way, parameters):
    found = static(Biased(way), "redundant-bias")
    assert [finding.evidence["parameters"] for finding in found.values()] == [parameters] * (parameters is not None)
    if parameters:
        assert found[None].severity == "info"
        assert ("linear.bias" if way == "linear" else "conv.bias") in found[None].message


def test_a_redundant_bias_really_changes_nothing_and_any_other_does():
    x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for way, redundant in (("plain", True), ("two-norms", True), ("relu-between", False), ("skip", False)):
        model = Biased(way).double().train()
        before = model(x.double())
        with torch.no_grad():
            model.conv.bias.add_(3.0)
        assert torch.allclose(model(x.double()), before, atol=1e-9) == redundant
        assert bool(static(model, "redundant-bias", IMAGES.double())) == redundant


def test_a_frozen_norm_subtracts_no_bias():
    model = Biased("plain")
    model.bn.eval()
    assert not static(model, "redundant-bias")
    convert_batch_norm(model, "frozen", include=("bn",))
    assert not static(model.eval(), "redundant-bias")


class Dropped(nn.Module):
    """A dropout at some place among norms."""

    def __init__(self, place, p=0.3):
        super().__init__()
        self.place, self.p = place, p
        self.a, self.b, self.c = (nn.BatchNorm2d(3) for _ in "abc")
        self.drop = nn.Dropout2d(p, inplace=place == "in-place") if place != "alpha" else nn.AlphaDropout(p)
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        x = self.a(x)
        if self.place == "function":
            x = F.dropout(x, self.p, training=self.training)
        elif self.place == "on-the-branch":
            x = x + self.drop(self.conv(x))
        elif self.place != "last":
            x = self.drop(x)
        x = self.b(self.conv(x).relu())
        x = self.c(x)
        return self.drop(x) if self.place == "last" else x


@pytest.mark.parametrize("place", ["module", "in-place", "function", "alpha", "on-the-branch", "last"])
def test_the_first_norm_behind_a_dropout_is_named(place):
    found = static(Dropped(place), "dropout-before-norm")
    assert {name: finding.severity for name, finding in found.items()} == ({} if place == "last" else {"b": "info"})
    if place != "last":
        function = {"function": "dropout", "alpha": "alpha_dropout"}.get(place, "dropout2d")
        where = "the root module" if place == "function" else "'drop'"
        assert found["b"].message.startswith(f"{function} (p=0.3) in {where} stands before it")
        assert found["b"].evidence["p"] == 0.3


def test_dropout_that_drops_nothing_or_stands_before_a_frozen_norm_is_none():
    assert not static(Dropped("module", p=0.0), "dropout-before-norm")
    model = Dropped("module")
    convert_batch_norm(model, "frozen", include=("b",))
    assert set(static(model, "dropout-before-norm")) == {"c"}, "a frozen norm passes the shift on"


@pytest.mark.parametrize(
    ("ratio", "severity"),
    [
        (None, "info"),
        (1.0, "info"),
        (1.09, "info"),
        (1.1, "warning"),
        (1.4, "warning"),
        (0.92, "info"),
        (0.9, "warning"),
    ],
    ids=str,
)
def test_a_measured_shift_of_variance_makes_it_a_warning(ratio, severity):
    model = Dropped("module").eval()
    rows = tuple(read_layer(name, layer, None) for name, layer in named_batch_norms(model).items())
    reading = AuditReading(model, rows, record=record_forward(model, IMAGES))
    if ratio is not None:
        reading = replace(reading, seen=Observations(dropout={"b": ratio}))
    rule = next(rule for rule in RULES if rule.slug == "dropout-before-norm")
    (finding,) = rule.find(rule, reading)
    assert (finding.layer, finding.severity, finding.evidence["variance_ratio"]) == ("b", severity, ratio)


def test_without_a_recorded_pass_the_report_says_what_it_did_not_look_at():
    missed = {each.what for each in audit_batch_norm(network()).not_looked}
    assert {"redundant-bias", "dropout-before-norm"} <= missed
