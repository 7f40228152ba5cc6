import pytest
import torch
from torch import nn

from bn_lightning.errors import BatchNormError
from bn_lightning.networks import ResidualNetwork
from bn_lightning.selection import named_batch_norms


def test_shapes_and_one_bn_a_convolution():
    net = ResidualNetwork(in_channels=3, num_classes=7, widths=(4, 8), blocks=2)
    convs = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    assert net(torch.zeros(2, 3, 16, 16)).shape == (2, 7)
    assert len(named_batch_norms(net)) == len(convs) == 1 + 4 * 2 + 1


def test_the_skip_carries_the_input():
    """With the last γ of a block at zero, the block is ReLU of its skip."""
    block = ResidualNetwork(widths=(4,), blocks=1).stages[0][0].eval()
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 4, 5, 5)
    torch.testing.assert_close(block(x), x)


def test_checkpoints_and_seeds_of_the_plain_network_stay_what_they_were():
    """Names, their order and the draws of the network as it was before it had knobs."""
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    block = ["conv1.weight", *(f"bn1.{each}" for each in norm), "conv2.weight", *(f"bn2.{each}" for each in norm)]
    skip = ["skip.0.weight", *(f"skip.1.{each}" for each in norm)]
    names = [
        "stem.0.weight",
        *(f"stem.1.{each}" for each in norm),
        *(f"stages.0.0.{each}" for each in block),
        *(f"stages.1.0.{each}" for each in (*block, *skip)),
        "head.weight",
        "head.bias",
    ]
    torch.manual_seed(0)
    state = ResidualNetwork(widths=(4, 8), blocks=1).state_dict()
    assert list(state) == names
    torch.manual_seed(0)
    for name in names:
        if state[name].dim() == 4:
            out_channels, in_channels, kernel, _ = state[name].shape
            conv = nn.Conv2d(in_channels, out_channels, kernel, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            assert torch.equal(state[name], conv.weight), name
    assert torch.equal(state["head.weight"], nn.Linear(8, 10).weight)


def body(**knobs):
    """Return the second block of a stage, which changes neither channels nor resolution."""
    return ResidualNetwork(widths=(4,), blocks=2, **knobs).stages[0][1]


@pytest.mark.parametrize("norm", ["batch", None, "ghost"])
@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("activation", ["relu", "elu", "rrelu"])
def test_a_pre_activation_block_adds_its_branch_to_what_it_is_given(norm, place, activation):
    block = body(preactivation=True, norm=norm, norm_place=place, activation=activation)
    x = torch.randn(8, 4, 5, 5)
    given = x.clone()
    torch.manual_seed(0)
    out = block(given)
    assert torch.equal(given, x), "an activation in place would spoil the skip"
    torch.manual_seed(0)
    branch = block.conv2(block.enter2(block.conv1(block.enter1(x.clone()))))
    torch.testing.assert_close(out, x + branch)
    assert branch.abs().max() > 0
    nn.init.zeros_(block.conv2.weight)
    if block.conv2.bias is not None:
        nn.init.zeros_(block.conv2.bias)
    assert torch.equal(block(given), x)


@pytest.mark.parametrize("preactivation", [False, True], ids=["post", "pre"])
def test_skip_init_starts_at_the_skip_alone(preactivation):
    block = body(preactivation=preactivation, norm=None, skip_init=0.0)
    x = torch.rand(2, 4, 5, 5)  # positive, so that the activation behind a sum leaves it
    torch.testing.assert_close(block(x), x)
    nn.init.constant_(block.scale.alpha, 0.5)
    half = block(x)
    nn.init.constant_(block.scale.alpha, 1.0)
    if preactivation:
        torch.testing.assert_close(half - x, (block(x) - x) / 2)
    else:
        without = body(norm=None)
        without.load_state_dict({k: v for k, v in block.state_dict().items() if "alpha" not in k})
        torch.testing.assert_close(block(x), without(x))
        assert not torch.allclose(half, x)


ORDERS = {
    ("post", "before"): "conv1 bn1 relu1 conv2 bn2 relu2",
    ("post", "after"): "conv1 relu1 bn1 conv2 relu2 bn2",
    ("pre", "before"): "enter1.norm enter1.act conv1 enter2.norm enter2.act conv2",
    ("pre", "after"): "enter1.act enter1.norm conv1 enter2.act enter2.norm conv2",
}


@pytest.mark.parametrize(("kind", "place"), ORDERS, ids=" ".join)
def test_the_order_of_calls_in_a_block(kind, place):
    block, seen = body(preactivation=kind == "pre", norm_place=place), []
    for name, module in block.named_modules():
        if not list(module.children()) and not isinstance(module, nn.Identity):
            if name.startswith("enter"):
                part = "norm" if isinstance(module, nn.BatchNorm2d) else "act"
                name = f"{name.partition('.')[0]}.{part}"
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    block(torch.randn(4, 4, 5, 5))
    assert seen == ORDERS[kind, place].split()


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_post_activation_block_by_hand(place):
    """The skip changes channels and resolution; its own norm is there only where norms come before the sum."""
    block = ResidualNetwork(widths=(4, 8), blocks=1, norm_place=place, activation="tanh").stages[1][0].eval()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.bias)
    x = torch.randn(4, 4, 6, 6)
    if place == "before":
        inner = block.bn2(block.conv2(block.bn1(block.conv1(x)).tanh()))
        expected = (inner + block.skip[1](block.skip[0](x))).tanh()
    else:
        inner = block.conv2(block.bn1(block.conv1(x).tanh()))
        expected = block.bn2((inner + block.skip[0](x)).tanh())
        assert len(block.skip) == 1
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_pre_activation_network_by_hand(place):
    """Where a block changes the resolution its skip reads the activated input; the last sum is activated too."""
    network = ResidualNetwork(widths=(4, 8), blocks=1, preactivation=True, norm_place=place, activation="tanh").eval()
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 5
    for norm in norms:
        nn.init.normal_(norm.running_mean)

    def entered(pair, x):
        norm = next(module for module in pair if isinstance(module, nn.BatchNorm2d))
        return norm(x).tanh() if place == "before" else norm(x.tanh())

    out = images = torch.randn(4, 1, 6, 6)
    out = network.stem[0](out)
    for stage in network.stages:
        block = stage[0]
        first = entered(block.enter1, out)
        skip = out if block.skip is None else block.skip(first)
        out = skip + block.conv2(entered(block.enter2, block.conv1(first)))
    assert network.stages[0][0].skip is None
    assert network.stages[1][0].skip is not None
    expected = network.head(entered(network.last, out).mean((2, 3)))
    torch.testing.assert_close(network(images), expected)


def test_branch_variance_without_norm_doubles_and_with_norm_grows_by_one():
    """Var(x) doubles a block without norm, and grows by about 1 with it (De & Smith, §2)."""
    torch.manual_seed(0)  # wide, linear, and without the padding's zeros, the law is exact up to sampling
    x = torch.randn(256, 64, 1, 1).expand(-1, -1, 3, 3)
    for norm, expected in ((None, 2.0**6), ("batch", 1 + 6.0)):
        network = ResidualNetwork(64, widths=(64,), blocks=6, preactivation=True, norm=norm, activation="none")
        out = x
        for block in network.stages[0]:
            for conv in (block.conv1, block.conv2):
                nn.init.orthogonal_(conv.weight[:, :, 1, 1])
                with torch.no_grad():
                    centre = conv.weight[:, :, 1, 1].clone()
                    conv.weight.zero_()
                    conv.weight[:, :, 1, 1] = centre
            out = block(out)
        assert (out.var() / x.var()).item() == pytest.approx(expected, rel=0.15)


def test_maxout_is_refused():
    with pytest.raises(BatchNormError, match="a residual network has no maxout"):
        ResidualNetwork(activation="maxout")
