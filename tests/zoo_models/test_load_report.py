"""What is odd about weights that were loaded: statistics, eps, momentum, keys beside."""

import argparse
import json
import warnings

import pytest
import timm
import torch
import transformers
from batch_normed import randomized
from torch import nn

from bn_lightning.errors import BatchNormError
from bn_lightning.zoo import load_checkpoint, load_zoo_model

# The same keys and shapes, with eps 1e-3 and momentum 0.01 in the first and torch's own in the second.
PORTED, NATIVE = "tf_efficientnet_lite0", "efficientnet_lite0"
TINY = {"depth_multiplier": 0.25, "finegrained_output": False}


def small(momentum=0.1):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(1), nn.BatchNorm1d(16, momentum=momentum))
    return randomized(net)


def about(report):
    return [(remark.severity, remark.about) for remark in report.remarks]


def same(net, other):
    return all(torch.equal(value, other.state_dict()[key]) for key, value in net.state_dict().items())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.pt"


def test_nothing_is_odd_about_weights_that_fit(path):
    torch.save({"state_dict": small().state_dict(prefix="module.")}, path)
    report = load_checkpoint(small(momentum=None), path)
    assert report.remarks == ()
    assert (report.tensors, report.prefix, report.source) == (12, "module.", None)
    assert (report.batch_norms, report.eps, report.momentum) == (2, (1e-5,), (0.1, None))
    assert str(report) == (
        f"{path}: 12 tensors loaded, 'module.' taken off their names; 2 BatchNorm layers with eps 1e-05, momentum 0.1 "
        "and None"
    )


def test_a_file_of_parameters_alone_loads_and_its_report_says_what_is_absent(path):
    trained, net = small(), small()
    with torch.no_grad():
        for value in [*trained.parameters()]:
            value.add_(1)
    torch.save(dict(trained.named_parameters()), path)
    statistics = {key: value.clone() for key, value in net.named_buffers()}
    report = load_checkpoint(net, path)
    assert about(report) == [("warning", "statistics")]
    assert report.remarks[0].layers == ("1", "3")
    assert "no running statistics for all 2 BatchNorm layers" in report.remarks[0].message
    assert "recalibrate_batch_norm" in report.remarks[0].message
    assert report.tensors == 6
    for key, value in net.named_parameters():
        assert torch.equal(value, dict(trained.named_parameters())[key])
    for key, value in net.named_buffers():
        assert torch.equal(value, statistics[key])


@pytest.mark.parametrize(
    "lost",
    [
        pytest.param(["1.running_mean"], id="one"),
        pytest.param(["1.running_mean", "1.running_var"], id="one-layer"),
        pytest.param(["1.running_mean", "1.running_var", "3.running_mean", "3.running_var", "0.bias"], id="and-a-bias"),
    ],
)
def test_statistics_absent_in_part_are_an_error(path, lost):
    torch.save({key: value for key, value in small().state_dict().items() if key not in lost}, path)
    net, before = small(), small()
    with pytest.raises(BatchNormError, match="the file lacks") as refused:
        load_checkpoint(net, path)
    assert all(f"'{key}'" in str(refused.value) for key in sorted(lost)[:3])
    assert same(net, before)


def test_statistics_of_a_new_layer_are_told(path):
    trained = small()
    trained[3].reset_running_stats()
    torch.save(trained.state_dict(), path)
    report = load_checkpoint(small(), path)
    assert about(report) == [("warning", "statistics")]
    assert report.remarks[0].layers == ("3",)
    assert "1 of 2 BatchNorm layers (3) are those of a new layer, mean 0 and variance 1" in report.remarks[0].message


@pytest.mark.parametrize("momentum", [0.1, 0.5, 0.99, 1.0])
def test_a_momentum_in_keras_convention_is_told(path, momentum):
    torch.save(small().state_dict(), path)
    report = load_checkpoint(small(momentum), path)
    assert about(report) == ([("warning", "momentum")] if momentum > 0.5 else [])
    if momentum == 0.99:
        assert report.remarks[0].layers == ("3",)
        assert "0.99 for 0.01" in report.remarks[0].message


def test_transformers_keras_momenta_are_warned_of(monkeypatch):
    """Its MobileNets keep TensorFlow's decay as torch's momentum (5.23): one batch in training replaces all."""
    with pytest.warns(UserWarning, match=r"'hf:mobilenet_v1': momentum=0.9997 of all 27 .*0.9997 for 0.0003"):
        net = load_zoo_model("hf:mobilenet_v1")
    norm = next(module for module in net.modules() if isinstance(module, nn.BatchNorm2d))
    norm.train()(5 + torch.randn(64, norm.num_features, 2, 2, generator=torch.Generator().manual_seed(0)))
    assert (norm.running_mean - 5).abs().max() < 0.5, "the old statistics, 0, weigh next to nothing"


@pytest.mark.parametrize(
    ("content", "said_by"),
    [
        pytest.param({"arch": PORTED}, "the file's 'arch'", id="timm"),
        pytest.param({"args": argparse.Namespace(model=PORTED, lr=0.1)}, "the file's args.model", id="command-line"),
        pytest.param(
            {"hyper_parameters": {"model": f"timm:{PORTED}"}}, r"the file's hyper_parameters\['model'\]", id="ours"
        ),
    ],
)
def test_weights_from_a_network_of_another_eps_are_told(path, content, said_by):
    ported = randomized(timm.create_model(PORTED)).eval()
    torch.save({**content, "state_dict": ported.state_dict()}, path)
    with pytest.warns(UserWarning, match=f"eps is 1e-05 in all 49 BatchNorm layers, and 0.001 in .*{said_by}") as told:
        net = load_zoo_model(f"timm:{NATIVE}", checkpoint=path)
    assert len(told) == 1
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    report = load_checkpoint(net, path)
    assert report.source == f"timm:{PORTED}"
    assert report.remarks == (), "cured"
    # It was worth a warning: eps alone changes the outputs.
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = ported(x)
        for module in ported.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 1e-5
        assert not torch.allclose(ported(x), exact, rtol=1e-3)


def test_the_same_network_and_what_is_not_known_raise_no_remark(path):
    net = randomized(timm.create_model("test_resnet"))
    for arch in ("test_resnet", "a_network_of_a_later_timm", 3):
        torch.save({"arch": arch, "state_dict": net.state_dict()}, path)
        report = load_checkpoint(net, path)
        assert report.remarks == ()
        assert report.source == ("timm:test_resnet" if arch == "test_resnet" else None)
    torch.save({"arch": "test_resnet", "state_dict": small().state_dict()}, path)
    assert load_checkpoint(small(), path).source is None, "a network of nobody's zoo"


def test_eps_and_momentum_that_timms_script_was_given_count(path):
    net = randomized(timm.create_model("test_resnet"))
    arguments = argparse.Namespace(model="test_resnet", bn_eps=1e-3, bn_momentum=0.1)
    torch.save({"arch": "test_resnet", "args": arguments, "state_dict": net.state_dict()}, path)
    report = load_checkpoint(net, path)
    assert about(report) == [("warning", "eps")]
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    assert load_checkpoint(net, path).remarks == ()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.3
    report = load_checkpoint(net, path)
    assert about(report) == [("info", "momentum")]
    assert "is 0.3 in all 15 BatchNorm layers, and 0.1 in" in report.remarks[0].message


def test_a_configuration_beside_the_file_says_the_eps(tmp_path):
    config = transformers.MobileNetV1Config(**TINY, layer_norm_eps=1e-2)
    saved = randomized(transformers.MobileNetV1ForImageClassification(config))
    saved.save_pretrained(tmp_path)
    net = transformers.MobileNetV1ForImageClassification(transformers.MobileNetV1Config(**TINY))
    report = load_checkpoint(net, tmp_path / "model.safetensors")
    assert about(report) == [("warning", "momentum"), ("warning", "eps")]
    assert "eps is 0.001 in all 27 BatchNorm layers, and 0.01 in" in report.remarks[1].message
    (tmp_path / "config.json").write_text("{")
    assert about(load_checkpoint(net, tmp_path / "model.safetensors")) == [("warning", "momentum")]


@pytest.mark.parametrize("attribute", ["net", "model", "backbone.model"])
def test_a_network_is_found_under_any_attribute_of_a_lightning_checkpoint(path, attribute):
    trained, net = small(), small()
    with torch.no_grad():
        trained[1].running_mean.add_(1)
    state = {**trained.state_dict(prefix=f"{attribute}."), "criterion.weight": torch.ones(2)}
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.6.6"}, path)
    report = load_checkpoint(net, path)
    assert same(net, trained)
    assert report.prefix == f"{attribute}."
    assert about(report) == [("info", "keys")]
    assert "'criterion.weight'" in report.remarks[0].message
    torch.save({"state_dict": state}, path)
    with pytest.raises(BatchNormError, match="none were loaded"):
        load_checkpoint(net, path)


def test_the_report_shows_itself_and_goes_into_json(path):
    torch.save(dict(small().named_parameters()), path)
    report = load_checkpoint(small(0.99), path)
    assert json.loads(json.dumps(report.to_dict()))["remarks"][0]["about"] == "statistics"
    shown = report._repr_html_()
    assert "<table" in shown
    assert "Keras&#x27; convention" in shown
    assert [line.split(":")[0] for line in str(report).splitlines()[1:]] == ["warning", "warning"]


def test_building_the_network_that_a_file_names_leaves_the_random_state_alone(path):
    net = randomized(timm.create_model("test_resnet"))
    torch.save({"arch": "test_resnet", "state_dict": net.state_dict()}, path)
    before = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_checkpoint(net, path)
    assert torch.equal(torch.random.get_rng_state(), before)
