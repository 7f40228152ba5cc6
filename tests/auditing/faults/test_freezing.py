"""Half-frozen layers and wrong modes, seen in the model or in what was watched, and none where freezing is whole."""

import copy

import pytest
import torch
from auditing.faults.catalogue_freezing import FAULTS, fine_tuned, shifted
from auditing.faults.digits_training import batch_norms, digits, fit, network

from bn_lightning import apply_fixes, convert_batch_norm
from bn_lightning.auditing import LayerHistory, TrainingHistory, audit_batch_norm


def of_rule(report, slug):
    return {finding.layer: finding for finding in report.findings if finding.rule == slug}


def watched(**seen):
    return TrainingHistory(40, {name: LayerHistory(**seen) for name in ("0.1", "0.4")})


@pytest.mark.parametrize(
    ("slug", "severities"),
    [
        pytest.param("frozen-weights-moving-statistics", {"0.1": "warning", "0.4": "warning"}, id="frozen-weights"),
        pytest.param("untracked-freeze", {"0.1": "warning", "0.4": "warning"}, id="untracked-freeze"),
        pytest.param("wrong-mode", {"0.4": "error"}, id="wrong-mode"),
    ],
)
def test_a_training_with_the_fault_is_found_at_its_layers(slug, severities):
    found = of_rule(FAULTS[slug](), slug)
    assert {name: finding.severity for name, finding in found.items()} == severities


def test_statistics_moved_under_frozen_weights_are_told_after_training_too():
    model, optimizer = fine_tuned()
    slug = "frozen-weights-moving-statistics"
    model.eval()
    assert not of_rule(audit_batch_norm(model), slug), "in evaluation mode nothing moves"
    found = of_rule(audit_batch_norm(model, optimizer=optimizer, history=watched(forward_updates=1.0)), slug)
    assert set(found) == {"0.1", "0.4"}
    assert found["0.1"].evidence["forward_updates"] == 1.0
    model.train()
    assert not of_rule(audit_batch_norm(model, history=watched(forward_updates=0.0)), slug), "watched, and still"


def test_an_optimizer_that_lacks_them_freezes_weights_as_well():
    model = network()
    head = torch.optim.SGD(model[-1].parameters(), lr=0.1)
    slug = "frozen-weights-moving-statistics"
    found = of_rule(audit_batch_norm(model, optimizer=head), slug)
    assert set(found) == {"0.1", "0.4"}
    assert "has no optimizer" in found["0.1"].message
    assert not of_rule(audit_batch_norm(model), slug)
    rest = torch.optim.SGD(model[0].parameters(), lr=0.1)
    assert not of_rule(audit_batch_norm(model, optimizer=(head, rest)), slug)
    elsewhere = torch.optim.SGD(network().parameters(), lr=0.1)
    assert not of_rule(audit_batch_norm(model, optimizer=elsewhere), slug), "it trains nothing of this model"


@pytest.mark.parametrize("freeze", ["kind", "mode", "momentum", "everything", "beta-trains"])
def test_freezing_that_is_whole_or_no_freezing_is_not_accused(freeze):
    model, _ = fine_tuned()
    if freeze == "kind":
        convert_batch_norm(model, "frozen")
    for layer in batch_norms(model).values():
        if freeze == "mode":
            layer.eval()
        elif freeze == "momentum":
            layer.momentum = 0.0
        elif freeze == "beta-trains":
            layer.bias.requires_grad_(True)
    if freeze == "everything":
        model.requires_grad_(False)
    assert not of_rule(audit_batch_norm(model), "frozen-weights-moving-statistics")


def test_untracked_layers_with_statistics_are_a_fault_and_without_are_not():
    model = network(track_running_stats=False)
    assert not of_rule(audit_batch_norm(model), "untracked-freeze")
    model = network()
    assert not of_rule(audit_batch_norm(model), "untracked-freeze")
    batch_norms(model)["0.4"].track_running_stats = False
    assert set(of_rule(audit_batch_norm(model), "untracked-freeze")) == {"0.4"}


def test_a_layer_left_in_training_mode_is_put_into_evaluation_mode():
    model = network()
    fit(model, digits())
    model.eval()[0][4].train()
    report = audit_batch_norm(model)
    assert set(of_rule(report, "wrong-mode")) == {"0.4"}
    apply_fixes(model, report)
    assert not model[0][4].training
    assert not of_rule(audit_batch_norm(model), "wrong-mode")


@pytest.mark.parametrize(
    ("seen", "severity"),
    [
        pytest.param({"validation_updates": 3}, "error", id="updates-in-validation"),
        pytest.param({"validated_in_training_mode": True}, "error", id="mode-in-validation"),
        pytest.param({"training_share": 0.0}, "warning", id="never-in-training-mode"),
        pytest.param({"training_share": 0.5}, "warning", id="half-in-training-mode"),
        pytest.param({"training_share": 1.0}, None, id="always-in-training-mode"),
        pytest.param({"forward_updates": 1.0}, None, id="nothing-known-of-modes"),
    ],
)
def test_modes_that_were_watched(seen, severity):
    model = network()
    found = of_rule(audit_batch_norm(model, history=watched(**seen)), "wrong-mode")
    assert {name: finding.severity for name, finding in found.items()} == (
        {} if severity is None else {"0.1": severity, "0.4": severity}
    )


def test_evaluation_mode_all_through_training_is_a_way_to_fine_tune_with_learned_statistics():
    """As norm_eval=True in mmdet, which is the default there."""
    model = network()
    fit(model, digits())
    found = of_rule(audit_batch_norm(model, history=watched(training_share=0.0)), "wrong-mode")
    assert {name: finding.severity for name, finding in found.items()} == {"0.1": "info", "0.4": "info"}
    half = of_rule(audit_batch_norm(model, history=watched(training_share=0.5)), "wrong-mode")
    assert {finding.severity for finding in half.values()} == {"warning"}


@pytest.mark.parametrize("frozen", [True, False], ids="frozen={}".format)
def test_layers_without_weights_go_by_those_around_them(frozen):
    model = network(affine=False)
    model[0].requires_grad_(not frozen)
    moved = audit_batch_norm(model, history=watched(forward_updates=1.0))
    assert sorted(of_rule(moved, "frozen-weights-moving-statistics")) == (["0.1", "0.4"] if frozen else [])
    stood = of_rule(audit_batch_norm(model, history=watched(training_share=0.0)), "wrong-mode")
    assert {name: finding.severity for name, finding in stood.items()} == (
        {} if frozen else {"0.1": "warning", "0.4": "warning"}
    )


@pytest.mark.parametrize(
    ("seen", "change", "expected"),
    [
        pytest.param({"forward_updates": 0.0}, None, ["0.1", "0.4"], id="never-moved"),
        pytest.param({"forward_updates": 0.5}, None, [], id="moved"),
        pytest.param({"forward_updates": 0.0, "backward_updates": 1.0}, None, [], id="moved-in-the-backward-pass"),
        pytest.param({"forward_updates": 0.0}, "momentum", [], id="momentum-0"),
        pytest.param({"forward_updates": 0.0}, "domain", [], id="another-domain"),
        pytest.param({"forward_updates": 0.0}, "frozen-weights", [], id="frozen-weights"),
        pytest.param({"forward_updates": 0.0}, "not-run", [], id="a-part-that-does-not-run"),
    ],
)
def test_statistics_that_never_moved_in_training_mode(seen, change, expected):
    model = network()
    for layer in batch_norms(model).values():
        if change == "momentum":
            layer.momentum = 0.0
    if change == "domain":
        convert_batch_norm(model, "domain", num_domains=2)
    if change == "frozen-weights":
        model[0].requires_grad_(False)
    x = None if change == "not-run" else torch.randn(2, 1, 8, 8)
    report = audit_batch_norm(model, example_inputs=x, history=watched(training_share=1.0, **seen))
    found = of_rule(report, "wrong-mode")
    assert {name: finding.severity for name, finding in found.items()} == dict.fromkeys(expected, "warning")


def test_weights_without_a_learning_rate_are_frozen_and_those_at_the_end_of_a_schedule_are_not():
    model = network()
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[-1].parameters(), "lr": 0.1}]
    optimizer, slug = torch.optim.SGD(groups), "frozen-weights-moving-statistics"
    assert "learning rate of 0" in of_rule(audit_batch_norm(model, optimizer=optimizer), slug)["0.1"].message
    ended = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(ended, lambda step: 1.0 if step == 0 else 0.0)
    ended.step()
    schedule.step()
    assert ended.param_groups[0]["lr"] == 0
    assert not of_rule(audit_batch_norm(model, optimizer=ended), slug)
    by_hand = torch.optim.SGD(model.parameters(), lr=0.0)
    assert not of_rule(audit_batch_norm(model, optimizer=by_hand), slug)


def test_evaluation_mode_in_training_is_a_note_where_weights_learn_and_right_where_they_do_not():
    model = network()
    model[0][1].eval()
    found = of_rule(audit_batch_norm(model), "wrong-mode")
    assert {name: finding.severity for name, finding in found.items()} == {"0.1": "info"}
    model[0][1].requires_grad_(False)
    for history in (None, watched(training_share=0.0)):
        assert "0.1" not in of_rule(audit_batch_norm(model, history=history), "wrong-mode")
    whole = copy.deepcopy(model)
    convert_batch_norm(whole, "frozen")
    assert not of_rule(audit_batch_norm(whole, history=watched(training_share=0.0)), "wrong-mode")


def test_a_healthy_fine_tuning_has_nothing_of_the_kind():
    model = network()
    fit(model, digits())
    convert_batch_norm(model, "frozen")
    model[0].requires_grad_(False)
    optimizer = fit(model, shifted(), epochs=2)
    for mode in (True, False):
        found = {finding.rule for finding in audit_batch_norm(model.train(mode), optimizer=optimizer).findings}
        assert not found & {"frozen-weights-moving-statistics", "untracked-freeze", "wrong-mode"}
