"""When alerts are told, of which layers, and when not."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from monitoring.alert_samples import HALF, block, norms, reading, relu, sample

from bn_lightning.errors import BatchNormError
from bn_lightning.monitoring import Alert, AlertRules, RunningSnapshot


@dataclass(frozen=True)
class Case:
    """How to make a sample for a rule: one that is well, at the threshold, above it, and between it and the end."""

    rule: str
    look: Callable[[AlertRules], Callable]
    well: object
    at: object
    above: object
    between: object
    patience: int = 3


def activations(rules):
    return rules.of_activations


def gradients(rules):
    return rules.of_gradients


def running(rules):
    return rules.of_running


def above(value):
    return math.nextafter(value, math.inf)


def saturated(share):
    return sample(limits={"fc": HALF}, fc=block(largest=share * HALF, smallest=0.0))


CASES = [
    Case("dead", activations, relu(0.4), relu(0.5), relu(0.501), relu(0.45)),
    Case("saturation", activations, saturated(0.25), saturated(0.5), saturated(above(0.5)), saturated(0.3)),
    Case(
        "vanishing-gradient",
        gradients,
        norms(10**-1.99, 1, 1),
        norms(10**-2.49, 1, 1),
        norms(10**-2.51, 1, 1),
        norms(10**-2.2, 1, 1),
    ),
    Case(
        "exploding-gradient",
        gradients,
        norms(10**1.99, 1, 1),
        norms(10**2.49, 1, 1),
        norms(10**2.51, 1, 1),
        norms(10**2.2, 1, 1),
    ),
    Case("drift", running, reading(drift=0.125), reading(drift=0.25), reading(drift=above(0.25)), reading(drift=0.2)),
    Case("nonfinite", activations, sample(fc=block()), sample(fc=block()), sample(fc=block(nonfinite=1)), None, 1),
    Case(
        "nonfinite-gradient", gradients, sample(fc=block()), sample(fc=block()), sample(fc=block(nonfinite=1)), None, 1
    ),
    Case(
        "nonfinite-statistics",
        running,
        reading(),
        reading(),
        reading(nonfinite=2, spoiled_steps=1, first_spoiled=7),
        None,
        1,
    ),
]
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: case.rule)


def told(case, samples, rules=None):
    """Return the numbers of the samples at which something was told."""
    look = case.look(rules or AlertRules([case.rule]))
    return [number for number, each in enumerate(samples) if look(each)]


@EACH
def test_is_silent_at_the_threshold_and_told_once_above_it(case):
    assert told(case, [case.at] * 20) == []
    assert told(case, [case.well] * 4 + [case.above] * 20) == [3 + case.patience]


@EACH
def test_one_sample_short_of_the_patience_is_silent(case):
    short = [case.above] * (case.patience - 1) + [case.at]
    assert told(case, short * 5) == []


@EACH
def test_is_told_again_only_after_it_has_ended(case):
    begun = [case.above] * case.patience
    first = case.patience - 1
    for pause in ([case.well] * 2, *([[case.between] * 9] if case.between else [])):
        assert told(case, begun + pause + begun) == [first], "it never ended"
    assert told(case, begun + [case.well] * 3 + begun) == [first, first + 3 + case.patience]


@EACH
def test_what_says_nothing_counts_neither_way(case):
    empty = RunningSnapshot((), None, {}, {}) if case.look is running else sample()
    unknown = (
        reading(drift=None, steps=0) if case.look is running else sample(fc=torch.zeros(7, 0, dtype=torch.float64))
    )
    with_gaps = [
        each for _ in range(case.patience) for each in (empty, case.above, unknown if case.patience > 1 else empty)
    ]
    assert told(case, with_gaps) == [3 * case.patience - 2]


@EACH
def test_the_message_says_what_where_and_when(case):
    look = case.look(AlertRules())
    alerts = [alert for _ in range(5) for alert in look(case.above) if alert.rule == case.rule]
    assert len(alerts) == 1
    (alert,) = alerts
    assert str(alert) == alert.message
    assert repr(alert.layer) in alert.message
    assert alert.message.startswith(case.rule)
    assert alert.step == (50 if case.look is running else None)
    assert ("at optimizer step 50" in alert.message) == (case.look is running)
    assert "expected" in alert.message or "should be finite" in alert.message or "were NaN or infinite" in alert.message


@pytest.mark.parametrize("chosen", [False, [], ["drift", "dead"]], ids=str)
def test_only_chosen_rules_speak(chosen):
    for case in CASES:
        found = {alert.rule for _ in range(5) for alert in case.look(AlertRules(chosen))(case.above)}
        assert found <= set(chosen or ())
        expected = [2] if chosen and case.rule in chosen else []
        assert told(case, [case.above] * 9, AlertRules(chosen)) == expected


def test_every_rule_has_a_name_and_a_case():
    assert {case.rule for case in CASES} | {"scale-jump"} == set(AlertRules.names)
    assert len(AlertRules.names) == 9
    for name in AlertRules.names:
        assert f"``{name}``" in AlertRules.__doc__


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        pytest.param("dead", r"write \['dead'\]", id="a bare string"),
        pytest.param(["deed"], "no alert is called 'deed' .did you mean 'dead'.*'drift'", id="an unknown name"),
    ],
)
def test_names_that_make_no_sense_are_refused(rules, words):
    with pytest.raises(BatchNormError, match=words):
        AlertRules(rules)


def test_layers_in_which_the_same_begins_are_one_alert():
    bad = sample(step=7, a=block(), b=block(nonfinite=1), c=block(nonfinite=400), d=block(nonfinite=2))
    (alert,) = AlertRules(["nonfinite"]).of_activations(bad)
    assert (alert.layer, alert.step) == ("b", 7), "the first in order of execution, not the worst"
    assert "'b' and 2 other layers at optimizer step 7" in alert.message


def test_the_worst_layer_is_named_where_order_says_nothing():
    rules, limits = AlertRules(["saturation"]), {"a": HALF, "b": HALF, "c": HALF}
    bad = sample(limits=limits, a=block(largest=0.6 * HALF), b=block(largest=0.9 * HALF), c=block())
    (alert,) = [alert for _ in range(3) for alert in rules.of_activations(bad)]
    assert alert.layer == "b"
    assert "and 1 other layer:" in alert.message


def test_a_layer_that_follows_later_is_told_alone():
    rules = AlertRules(["nonfinite"])
    assert [alert.layer for alert in rules.of_activations(sample(a=block(nonfinite=1), b=block()))] == ["a"]
    (alert,) = rules.of_activations(sample(a=block(nonfinite=1), b=block(nonfinite=1)))
    assert (alert.layer, "other" in alert.message) == ("b", False)


def test_layers_may_come_and_go():
    rules, bad, seen = AlertRules(["saturation"]), block(largest=0.9 * HALF), []
    for blocks in ({"a": bad}, {"b": bad}, {"a": bad, "b": bad}, {"c": block()}, {"a": bad}, {"b": bad}):
        seen.append([each.layer for each in rules.of_activations(sample(limits=dict.fromkeys("abc", HALF), **blocks))])
    assert seen == [[], [], [], [], ["a"], ["b"]]


def test_alerts_are_plain_and_deterministic():
    def alerts():
        rules = AlertRules()
        return [a for case in CASES for _ in range(4) for a in case.look(rules)(case.above)]

    assert alerts() == alerts()
    assert all(isinstance(alert, Alert) for alert in alerts())


def test_three_hundred_layers_take_milliseconds():
    layers = {f"layer{index}": block(channels=64, std=1 + index % 7) for index in range(300)}
    rules, taken = AlertRules(), []
    for step in range(30):
        snapshot = sample(step=step, **layers)
        assert snapshot.rows  # pooled once, by whoever reads it first
        started = time.perf_counter()
        rules.of_activations(snapshot)
        rules.of_gradients(snapshot)
        taken.append(time.perf_counter() - started)
    assert min(taken) < 5e-3
