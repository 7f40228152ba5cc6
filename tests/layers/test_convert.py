"""A conversion changes the class of BatchNorm layers and loses nothing; undo leads back."""

import copy

import pytest
import torch
from batch_normed import everything, images, kinds, layers, net, randomized
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bn_lightning as bnl
from bn_lightning import convert_batch_norm, revert_batch_norm
from bn_lightning.errors import BatchNormError, ConversionError
from bn_lightning.layers import BatchRenorm, FrozenBatchNorm, GhostBatchNorm
from bn_lightning.layers.registry import VARIANTS

NAMES = sorted(VARIANTS)


@pytest.mark.parametrize("name", NAMES)
def test_a_conversion_loses_nothing_and_is_undone_bit_for_bit(name):
    model = net().to(memory_format=torch.channels_last)
    model.block[1].eval()
    model.flat.momentum = None if name != "debiased" else 0.2
    model.bn.weight.requires_grad_(False)
    model.bn.note = "mine"
    model.block[1].register_forward_hook(hook := lambda module, args, y: y)
    before, keys, strides = everything(model), list(model.state_dict()), model.conv.weight.stride()
    settings = [(m.eps, m.momentum, m.affine, m.track_running_stats, m.training) for m in layers(model)]
    parameters = [id(p) for p in model.parameters()]

    report = bnl.convert_batch_norm(model, name)
    assert kinds(model) == [VARIANTS[name]] * 3
    assert model.again is model.bn
    assert model.bn.note == "mine"
    assert settings == [(m.eps, m.momentum, m.affine, m.track_running_stats, m.training) for m in layers(model)]
    assert parameters == [id(p) for p in model.parameters()]
    if name != "domain":
        assert keys == list(model.state_dict())
        assert [entry[:2] for entry in before[3]] == [(key, id(b)) for key, b in model.named_buffers()]
    assert list(model.block[1]._forward_hooks.values()) == [hook]
    assert not model.bn.weight.requires_grad
    assert model.conv.weight.stride() == strides
    assert [(r.name, r.before, r.after) for r in report.rows] == [
        (row, was, VARIANTS[name].__name__)
        for row, was in [("bn", "BatchNorm2d"), ("block.1", "BatchNorm2d"), ("flat", "BatchNorm1d")]
    ]
    assert report.rows[0].reason.startswith("converted")
    assert report.rows[0].reason.endswith("(also registered as again)")

    report.undo()
    assert everything(model) == before
    report.undo()
    assert everything(model) == before


@pytest.mark.parametrize("name", [*NAMES, "group"])
def test_a_dry_run_says_the_same_and_changes_nothing(name):
    options = {"num_groups": 2} if name == "group" else {}
    model = net()
    before = everything(model)
    planned = bnl.convert_batch_norm(model, name, dry_run=True, **options)
    assert everything(model) == before
    planned.undo()
    assert everything(model) == before
    assert "would convert 3 of 3" in str(planned)
    assert planned.rows == bnl.convert_batch_norm(model, name, **options).rows


@pytest.mark.parametrize("name", [*NAMES, "group"])
def test_converting_twice_changes_nothing(name):
    options = {"num_groups": 2} if name == "group" else {}
    model = net()
    first = bnl.convert_batch_norm(model, name, **options)
    before = everything(model)
    report = bnl.convert_batch_norm(model, name, **options)
    assert everything(model) == before
    assert all(row.reason.startswith("already") for row in report.rows)
    report.undo()
    assert everything(model) == before
    first.undo()
    assert kinds(model) == [nn.BatchNorm2d, nn.BatchNorm2d, nn.BatchNorm1d]


def test_other_options_reconfigure_and_say_so():
    model = net()
    bnl.convert_batch_norm(model, "ghost", virtual_batch_size=4)
    report = bnl.convert_batch_norm(model, GhostBatchNorm, include=["bn"], virtual_batch_size=2)
    assert report.rows[0].reason == "converted: virtual_batch_size 4 → 2 (also registered as again)"
    assert [layer.virtual_batch_size for layer in layers(model)] == [2, 4, 4]
    report.undo()
    assert [layer.virtual_batch_size for layer in layers(model)] == [4, 4, 4]


def test_from_variant_to_variant_and_back_in_reverse_order():
    model = net()
    before = everything(model)
    ghost = bnl.convert_batch_norm(model, "ghost", virtual_batch_size=2)
    between = everything(model)
    renorm = bnl.convert_batch_norm(model, "renorm")
    assert kinds(model) == [BatchRenorm] * 3
    assert "virtual_batch_size" not in model.bn.__dict__
    with pytest.raises(
        ConversionError, match=r"'bn' is a BatchRenorm by now, not the GhostBatchNorm.*nothing was undone"
    ):
        ghost.undo()
    assert kinds(model) == [BatchRenorm] * 3
    renorm.undo()
    assert everything(model) == between
    ghost.undo()
    assert everything(model) == before


def test_undo_keeps_what_training_and_the_user_did_since():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    report = bnl.convert_batch_norm(model, "ghost", virtual_batch_size=2)
    model(images()).square().mean().backward()
    optimizer.step()
    model.bn.eval()
    model.bn.momentum = 0.5
    model.flat.register_forward_hook(lambda module, args, y: y)
    learned = copy.deepcopy(model.state_dict())
    report.undo()
    assert not model.bn.training
    assert model.bn.momentum == 0.5
    assert len(model.flat._forward_hooks) == 1
    assert all(torch.equal(value, learned[key]) for key, value in model.state_dict().items())
    assert int(model.bn.num_batches_tracked) == 9  # two calls


def test_undo_takes_back_the_count_that_conversion_set():
    model = net()
    for layer in layers(model):
        layer.num_batches_tracked.zero_()
    report = bnl.convert_batch_norm(model, "renorm")
    assert "num_batches_tracked 0 → 40000" in report.rows[0].reason
    model(images())
    report.undo()
    assert [int(layer.num_batches_tracked) for layer in layers(model)] == [2, 1, 1]
    model.flat.num_batches_tracked.zero_()
    loaded = bnl.convert_batch_norm(model, "renorm", include=["flat"])
    model.flat.num_batches_tracked.fill_(3)  # as by load_state_dict
    loaded.undo()
    assert int(model.flat.num_batches_tracked) == 3


def test_undo_gives_back_requires_grad_unless_the_user_set_it():
    model = net()
    report = bnl.convert_batch_norm(model, "frozen", trainable=False)
    assert not model.bn.weight.requires_grad
    assert not model.bn.bias.requires_grad
    assert model.conv.weight.requires_grad
    report.undo()
    assert model.bn.weight.requires_grad
    assert model.bn.bias.requires_grad
    report = bnl.convert_batch_norm(model, "frozen", trainable=False)
    model.bn.weight.requires_grad_(True)
    report.undo()
    assert all(p.requires_grad for p in model.parameters())
    report = bnl.convert_batch_norm(model, "ghost")
    model.bn.weight.requires_grad_(False)
    report.undo()
    assert not model.bn.weight.requires_grad


def test_the_root_may_be_the_layer():
    layer = randomized(nn.BatchNorm2d(3))
    report = bnl.convert_batch_norm(layer, "frozen")
    assert type(layer) is FrozenBatchNorm
    assert "(root)" in str(report)
    bnl.revert_batch_norm(layer)
    assert type(layer) is nn.BatchNorm2d


def test_include_and_exclude():
    model = net()
    report = bnl.convert_batch_norm(model, "ghost", include=["b*"], exclude=["block.*"])
    assert [(row.name, row.reason.split(" (")[0]) for row in report.rows] == [
        ("bn", "converted"),
        ("block.1", "excluded by pattern"),
        ("flat", "excluded by pattern"),
    ]
    assert kinds(model) == [GhostBatchNorm, nn.BatchNorm2d, nn.BatchNorm1d]


def test_the_processes_of_sync_batch_norm_stay_together():
    layer = nn.SyncBatchNorm(4, process_group="half of them")
    bnl.convert_batch_norm(layer, "cross_replica")
    assert layer.process_group == "half of them"
    assert bnl.convert_batch_norm(layer, "cross_replica").rows[0].reason.startswith("already")
    assert (
        "process_group half of them → None"
        in bnl.convert_batch_norm(layer, "cross_replica", process_group=None).rows[0].reason
    )
    bnl.convert_batch_norm(layer, "masked")
    bnl.revert_batch_norm(layer)
    assert type(layer) is nn.SyncBatchNorm
    assert layer.process_group is None


def test_the_report_in_every_form():
    model = net()
    report = bnl.convert_batch_norm(model, "ghost", exclude=["flat"])
    assert str(report).splitlines()[0] == "converted 2 of 3 BatchNorm layers to GhostBatchNorm"
    assert report.to_dict()["rows"][2] == {
        "name": "flat",
        "before": "BatchNorm1d",
        "after": "BatchNorm1d",
        "reason": "excluded by pattern",
    }
    assert "<td>block.1</td>" in report._repr_html_()


@given(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4), st.booleans())
@settings(deadline=None, max_examples=25, derandomize=True)
def test_any_conversions_are_undone_in_reverse_order(names, train):
    model = net()
    before = everything(model)
    reports = [bnl.convert_batch_norm(model, name) for name in names]
    if train and "domain" not in names:
        model(images()).square().mean().backward()
        values = copy.deepcopy(model.state_dict())
    for report in reversed(reports):
        report.undo()
    if not train:
        assert everything(model) == before
    assert kinds(model) == [nn.BatchNorm2d, nn.BatchNorm2d, nn.BatchNorm1d]
    if train and "domain" not in names:
        assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())


def test_a_converted_layer_is_named_in_its_errors():
    model = nn.Sequential(nn.Sequential(nn.BatchNorm1d(3)), nn.BatchNorm1d(3))
    convert_batch_norm(model, "ghost", include=("0.0",))
    with pytest.raises(BatchNormError, match=r"'0\.0', a GhostBatchNorm\(3\), needs more than one value per channel"):
        model(torch.zeros(1, 3))
    revert_batch_norm(model)
    assert "known_as" not in model[0][0].__dict__


def test_the_printed_report_names_what_was_not_selected_below():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    report = convert_batch_norm(model, "ghost", include=("1",))
    assert [row.reason for row in report.rows] == ["excluded by pattern", "converted", "excluded by pattern"]
    assert str(report).splitlines()[-1] == "2 not selected: 0, 2"


def test_new_parameters_are_said_to_be_missing_in_the_optimizer():
    report = convert_batch_norm(nn.BatchNorm1d(3), "domain", num_domains=3, per_domain_affine=True)
    assert "4 new parameters: make the optimizer afterwards" in report.rows[0].reason


def test_what_the_callback_takes_is_not_what_the_function_takes():
    with pytest.raises(ConversionError, match="no option 'options' \\(pass them as they are: virtual_batch_size=16\\)"):
        convert_batch_norm(nn.BatchNorm1d(3), "ghost", options={"virtual_batch_size": 16})


def test_an_earlier_conversion_of_the_same_class_is_not_undone_over_a_later_one():
    layer = nn.BatchNorm1d(3)
    one = convert_batch_norm(layer, "ghost", virtual_batch_size=8)
    two = convert_batch_norm(layer, "ghost", virtual_batch_size=4)
    with pytest.raises(ConversionError, match="Undo the later conversion first"):
        one.undo()
    two.undo()
    assert layer.options() == {"virtual_batch_size": 8}
    one.undo()
    assert layer.__dict__.keys() == nn.BatchNorm1d(3).__dict__.keys()


def test_a_process_group_does_not_stay_behind():
    layer = nn.BatchNorm1d(3)
    convert_batch_norm(layer, "cross_replica")
    convert_batch_norm(layer, "ghost")
    assert "process_group" not in layer.__dict__
