"""Skip and branch variances against hooks, sums by hand and the laws of growth, however a network writes its sum."""

import copy
import math

import lightning.pytorch as pl
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from probes.probed import FailsAt, State, batch
from torch import nn

from bn_lightning.errors import BatchNormError
from bn_lightning.layers import convert_batch_norm
from bn_lightning.networks import ResidualNetwork
from bn_lightning.probes import branch_variance, effective_depth


def in_place(x, y):
    y += x
    return y


SUMS = {
    "plus": lambda x, y: x + y,
    "branch-first": lambda x, y: y + x,
    "in-place": in_place,
    "add_": lambda x, y: y.add_(x),
    "torch.add": torch.add,
    "keywords": lambda x, y: torch.add(input=x, other=y),
    "sum": lambda x, y: sum([x, y]),
}


class Block(nn.Module):
    def __init__(self, branch, add=SUMS["plus"], skip=None):
        super().__init__()
        self.branch, self.skip, self.add = branch, skip or nn.Identity(), add

    def forward(self, x):
        return self.add(self.skip(x), self.branch(x))


def normalized(width, add=SUMS["plus"]):
    linear = nn.Linear(width, width, bias=False)
    nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
    return Block(nn.Sequential(nn.BatchNorm1d(width), nn.ReLU(), linear), add)


def slow_variances(blocks, x):
    """Run block after block in float64, and look at both sides."""
    found, x = [], x.double()
    for block in copy.deepcopy(blocks).double().train():
        skip, branch = block.skip(x), block.branch(x)
        found.append((skip.detach().numpy().var(), branch.detach().numpy().var()))
        x = skip + branch
    return found


@pytest.mark.parametrize("add", SUMS.values(), ids=SUMS)
def test_variances_are_those_of_both_sides_however_they_are_added(add):
    torch.manual_seed(0)
    network = nn.Sequential(*(normalized(8, add) for _ in range(3)))
    network[1].skip = nn.Sequential(nn.Linear(8, 8))
    network[1].branch.append(nn.Linear(8, 8))
    x = 5 + torch.randn(32, 8)
    found = branch_variance(network, x)
    assert [row.name for row in found.blocks] == ["0", "1", "2"]
    for row, (skip, branch) in zip(found.blocks, slow_variances(network, x), strict=True):
        assert (row.skip, row.branch) == pytest.approx((skip, branch), rel=1e-5)
        assert row.share == pytest.approx(branch / (skip + branch), rel=1e-5)
    assert found.effective_depth == pytest.approx(sum(row.share for row in found.blocks))


def test_a_factor_in_the_sum_counts():
    network = Block(nn.Linear(4, 4), lambda x, y: torch.add(x, y, alpha=0.5))
    plain = branch_variance(Block(network.branch), batch(features=4)[0]).blocks[0]
    row = branch_variance(network, batch(features=4)[0]).blocks[0]
    assert (row.skip, row.branch) == pytest.approx((plain.skip, plain.branch / 4), rel=1e-6)


def test_branches_that_end_in_batch_norm_have_variance_one_and_the_skip_grows_by_one_a_block():
    torch.manual_seed(0)
    blocks = [Block(nn.Sequential(nn.Linear(256, 256), nn.BatchNorm1d(256, eps=1e-12))) for _ in range(20)]
    found = branch_variance(nn.Sequential(*blocks), F.batch_norm(torch.randn(512, 256), None, None, training=True))
    for place, row in enumerate(found.blocks, start=1):
        assert row.branch == pytest.approx(1, rel=1e-5)
        assert row.skip == pytest.approx(place, rel=0.1)
        assert row.share == pytest.approx(1 / (place + 1), rel=0.1)
    assert found.effective_depth == pytest.approx(sum(1 / (place + 1) for place in range(1, 21)), rel=0.05)


def test_without_normalization_the_variance_doubles_and_half_the_branches_are_passed():
    torch.manual_seed(0)
    blocks = [Block(nn.Sequential(nn.ReLU(), nn.Linear(256, 256, bias=False))) for _ in range(12)]
    for block in blocks:
        nn.init.kaiming_normal_(block.branch[1].weight, nonlinearity="relu")
    found = branch_variance(nn.Sequential(*blocks), torch.randn(256, 256))
    growth = (found.blocks[-1].skip / found.blocks[0].skip) ** (1 / 11)
    assert 1.6 < growth < 2.2
    assert found.effective_depth == pytest.approx(6, rel=0.1)


def test_effective_depth_is_half_the_depth_or_about_its_logarithm():
    assert effective_depth([0.5] * 1000) == 500
    harmonic = effective_depth(1 / (place + 1) for place in range(1, 1001))
    assert harmonic == pytest.approx(math.log(1000) + 0.5772 - 1, abs=1e-2)
    assert effective_depth([]) == 0


def hooked(network, x, blocks, branch, skip):
    """Read both sides of every block from hooks on its layers."""
    seen = {}

    def keep(key):
        def hook(module, args, output):
            seen[key] = output.detach().double().numpy().copy()

        return hook

    def keep_input(key):
        def hook(module, args):
            seen[key] = args[0].detach().double().numpy().copy()

        return hook

    network = copy.deepcopy(network).train()
    for name in blocks:
        block = network.get_submodule(name)
        network.get_submodule(f"{name}.{branch}").register_forward_hook(keep((name, 1)))
        projection = getattr(block, skip)
        if projection is None or isinstance(projection, nn.Identity):
            block.register_forward_pre_hook(keep_input((name, 0)))
        else:
            projection.register_forward_hook(keep((name, 0)))
    network(x)
    return [(name, seen[name, 0].var(), seen[name, 1].var()) for name in blocks]


def zoo(name):
    torch.manual_seed(0)
    if name == "torchvision":
        return torchvision.models.resnet18(num_classes=4), "bn2", "downsample"
    if name == "own":
        return ResidualNetwork(in_channels=3), "bn2", "skip"
    network = timm.create_model(name, num_classes=4, zero_init_last=False)
    return network, "conv3" if name == "resnetv2_50" else "bn2", "downsample"


ZOO = pytest.mark.parametrize("name", ["resnet18", "resnetv2_50", "torchvision", "own"])


@ZOO
def test_zoo_networks(name):
    network, branch, skip = zoo(name)
    x = torch.randn(4, 3, 32, 32)
    blocks = [each.rpartition(".")[0] for each, _ in network.named_modules() if each.endswith(f".{branch}")]
    found = branch_variance(network, x)
    expected = hooked(network, x, blocks, branch, skip)
    assert [(row.name, row.skip, row.branch) for row in found.blocks] == [
        (name, pytest.approx(skip, rel=1e-4), pytest.approx(branch, rel=1e-4)) for name, skip, branch in expected
    ]
    assert found.undecided == ()


@pytest.mark.parametrize("name", ["resnet18", "resnetv2_50"])
def test_zoo_networks_under_autocast_and_with_variants(name):
    network, _, _ = zoo(name)
    x = torch.randn(4, 3, 32, 32)
    plain = branch_variance(network, x)
    with torch.autocast("cpu", torch.bfloat16):
        low = branch_variance(network, x)
    assert [row.share for row in low.blocks] == pytest.approx([row.share for row in plain.blocks], rel=0.05)
    norm = "norm" if name == "resnetv2_50" else "bn"
    convert_batch_norm(network, "noisy", include=(f"*.0.{norm}1",))
    convert_batch_norm(network, "ghost", include=(f"*.1.{norm}1",), virtual_batch_size=2)
    convert_batch_norm(network, "renorm", include=(f"*.1.{norm}2",))
    assert [row.name for row in branch_variance(network, x).blocks] == [row.name for row in plain.blocks]


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(normalized(6), normalized(6))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.network(batch["x"]), batch["y"])


def test_a_lightning_module_by_its_training_step():
    pair, module = batch(), Module()
    found = branch_variance(
        module, {"x": pair[0], "y": pair[1]}, step=lambda module, batch: module.training_step(batch, 0)
    )
    plain = branch_variance(module.network, pair)
    assert [row.name for row in found.blocks] == ["network.0", "network.1"]
    assert [(row.skip, row.branch) for row in found.blocks] == [(row.skip, row.branch) for row in plain.blocks]


def test_it_takes_one_pass_and_gives_the_network_back_also_after_an_error():
    network, calls = nn.Sequential(normalized(6), nn.Dropout()).eval(), []
    network.register_forward_hook(lambda *_: calls.append(1))
    state = State(network)
    branch_variance(network, batch())
    state.assert_back()
    assert calls == [1]
    broken = nn.Sequential(network, FailsAt(0))
    state = State(broken)
    with pytest.raises(ArithmeticError, match="stop"):
        branch_variance(broken, batch(), step=lambda model, pair: model(pair[0]))
    state.assert_back()


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        both = self.one(x) + self.other(x)
        x = x + both
        return x + x.mean(0, keepdim=True)  # another shape: no residual addition


def test_sides_that_are_alike_are_told_and_two_additions_in_a_module_numbered():
    found = branch_variance(Two(), batch())
    assert [row.name for row in found.blocks] == ["(root)"]
    assert "not measured: its two sides pass 1 layer and 1 operation alike" in str(found)
    twice = branch_variance(nn.Sequential(Block(normalized(6))), batch()).blocks
    assert [row.name for row in twice] == ["0.branch", "0"]

    class Twice(nn.Linear):
        def forward(self, x):
            x = x + super().forward(x)
            return x + super().forward(x)

    assert [row.name for row in branch_variance(nn.Sequential(Twice(6, 6)), batch()).blocks] == ["0", "0 #2"]


def test_refuses_what_adds_nothing_or_cannot_be_run():
    with pytest.raises(BatchNormError, match="Sequential has no residual addition: expected x"):
        branch_variance(nn.Sequential(nn.Linear(6, 6)), batch())
    with pytest.raises(BatchNormError, match="step=lambda model, batch: model") as told:
        branch_variance(nn.Linear(6, 6), {"x": batch()[0]})
    assert "forward=" not in str(told.value)
    with pytest.raises(BatchNormError, match="step=lambda model, batch: model") as told:
        branch_variance(nn.Linear(5, 6), batch())
    assert "forward=" not in str(told.value)


def test_shows_itself():
    found = branch_variance(nn.Sequential(normalized(6), normalized(6)), batch())
    assert "effective depth" in str(found)
    assert "<table>" in found._repr_html_()
    assert found.scalars()["1/branch_variance"] == found.blocks[1].branch
    assert found.to_dict()["blocks"][0]["skip"] == found.blocks[0].skip
    assert len(found.figure().axes) == 2
