"""Every variant in five timm networks of different families: checkpoints, evaluation, a few steps of training."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import bn_lightning as bnl
from bn_lightning.layers.registry import VARIANTS

timm = pytest.importorskip("timm")

# Settings of the network, and the examples of a ghost batch: LeViT's are tokens, and pairs of those make any gradient
# explode, in a loop of plain BatchNorm as well.
NETWORKS = {
    "resnet18": ({}, 2),
    "mobilenetv3_small_050": ({}, 2),
    "regnety_002": ({}, 2),
    "ghostnet_050": ({}, 2),
    "levit_128s": ({"img_size": 64}, 16),
}
OPTIONS = {"adaptive": {"alpha": 0.0}, "group": {"num_groups": 2}}
NAMES = [*sorted(VARIANTS), "group"]


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    torch.manual_seed(0)
    settings, virtual_batch_size = NETWORKS[request.param]
    model = timm.create_model(request.param, num_classes=4, **settings)
    # What a trained network has: statistics of data. Made up ones would blow the activations up.
    model.train()
    with torch.no_grad():
        for seed in range(3):
            model(images(seed))
        for layer in batch_norms(model):
            if layer.weight is not None:
                layer.weight.uniform_(0.5, 1.0)
                layer.bias.normal_(0, 0.1)
    return model, virtual_batch_size


def images(seed=0):
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def batch_norms(model):
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@pytest.mark.parametrize("name", NAMES)
def test_convert_evaluate_train_and_load(network, name):
    plain, model = (copy.deepcopy(network[0]) for _ in range(2))
    options = {"virtual_batch_size": network[1]} if name == "ghost" else OPTIONS.get(name, {})
    number = len(batch_norms(model))
    expected = plain.eval()(images(9)).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    report = bnl.convert_batch_norm(model, name, **options)
    assert len(report.rows) == number
    assert all(row.changed for row in report.rows)

    if name != "group":
        torch.testing.assert_close(
            model.eval()(images(9)), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max())
        )
        model.load_state_dict(plain.state_dict(), strict=True)
    if name not in ("group", "domain"):
        plain.load_state_dict(model.state_dict(), strict=True)

    model.train()
    for step in range(2):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images(step)), torch.arange(4))
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert model.eval()(images(9)).isfinite().all()

    if name == "group":
        report.undo()
    else:
        bnl.revert_batch_norm(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    plain.load_state_dict(model.state_dict(), strict=True)
    # LeViT keeps what it derives from its weights until the mode changes.
    assert torch.equal(plain.train().eval()(images(9)), model(images(9)))
