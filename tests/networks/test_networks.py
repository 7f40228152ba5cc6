"""What every network here has to do with every norm: run, learn, fold, be named in a configuration."""

import json

import pytest
import torch
from jsonargparse import auto_cli
from torch import nn

import bn_lightning as bnl
from bn_lightning import networks
from bn_lightning.errors import BatchNormError
from bn_lightning.layers.registry import VARIANTS
from bn_lightning.networks import MLP, VGG, DeepLinearNetwork, ResidualNetwork, build_network
from bn_lightning.selection import named_batch_norms

IMAGES = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 3
SMALL = {
    "mlp": {"widths": (8, 8)},
    "deep_linear": {"in_features": 64, "width": 8, "depth": 4},
    "vgg": {"layout": ((4, 4), (8,)), "hidden_widths": (8,)},
    "residual": {"widths": (4, 8), "blocks": 1},
    "pre-activation": {"widths": (4, 8), "blocks": 1, "preactivation": True},
}
NORMS = ["batch", *VARIANTS, "group", None]


def build(name, **knobs):
    if knobs.get("norm") == "group":
        knobs["norm_options"] = {"num_groups": 2}
    return build_network(
        name if name in ("mlp", "vgg", "deep_linear") else "residual", **{"num_classes": 3, **SMALL[name], **knobs}
    )


def train(network, steps=2):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(network(IMAGES), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_trains_two_steps_and_folds(name, norm):
    torch.manual_seed(0)
    network = build(name, norm=norm)
    assert torch.tensor(train(network)).isfinite().all()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    norms = named_batch_norms(network)
    assert bool(norms) == (norm not in ("group", None))
    if norm not in ("batch", "ghost"):  # the other variants fold alike, which is tested with them
        return
    network.eval()
    logits = network(IMAGES)
    result = bnl.fold_batch_norm(network, IMAGES, inplace=False)
    kept = [row for row in result.report.rows if row.action == "kept"]
    # Before a pre-activation block's first norm stands a sum that the skip reads too.
    assert len(kept) < len(norms) if name == "pre-activation" else not kept, [str(row) for row in kept]
    torch.testing.assert_close(result.model(IMAGES), logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["mlp", "vgg"])
@pytest.mark.parametrize("activation", ["relu", "rrelu", "prelu", "elu", "maxout", "sigmoid", "tanh", "none"])
@pytest.mark.parametrize(("place", "affine"), [("before", False), ("after", True)])
def test_the_knobs_crossed(name, activation, place, affine):
    torch.manual_seed(0)
    network = build(name, activation=activation, norm_place=place, affine=affine, dropout=0.2, init="orthogonal")
    assert torch.tensor(train(network)).isfinite().all()
    folded = bnl.fold_batch_norm(network.eval(), IMAGES, inplace=False)
    assert folded.report.error is not None
    assert folded.report.error < 1e-9
    # Behind an activation, what reads the norm takes it up; not so a convolution with its zeros around the image.
    if name == "mlp" or place == "before":
        assert "kept" not in {row.action for row in folded.report.rows}


@pytest.mark.parametrize("norm", [None, "batch"])
def test_a_deep_linear_network_is_the_product_of_its_matrices(norm):
    network = DeepLinearNetwork(6, 3, width=5, depth=7, norm=norm, norm_options={"eps": 0.0} if norm else None).double()
    matrices = [layer.weight for layer in network.modules() if isinstance(layer, nn.Linear)]
    assert [tuple(matrix.shape) for matrix in matrices] == [(5, 6), *[(5, 5)] * 5, (3, 5)]
    product = torch.eye(6, dtype=torch.float64)
    for matrix in matrices:
        product = matrix @ product
    torch.testing.assert_close(network.product(), product)
    x = torch.randn(11, 6, dtype=torch.float64)
    # Fresh running statistics are those of an identity, so that in evaluation norms change nothing.
    torch.testing.assert_close(network.eval()(x), x @ product.T)
    assert DeepLinearNetwork(6, 3, depth=1, norm=norm).product().shape == (3, 6)


def test_the_network_of_santurkar_et_al():
    network = DeepLinearNetwork(norm=None)
    assert [tuple(parameter.shape) for parameter in network.parameters()] == [(10, 10)] * 25


def test_vgg_layouts():
    convs = {
        name: [m.out_channels for m in VGG(3, layout=name).modules() if isinstance(m, nn.Conv2d)]
        for name in ("vgg11", "vgg16")
    }
    # Columns A and D of the paper's Table 1.
    assert convs["vgg11"] == [64, 128, 256, 256, 512, 512, 512, 512]
    assert convs["vgg16"] == [64, 64, 128, 128, *[256] * 3, *[512] * 6]
    assert VGG(3, layout="vgg11").eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    with pytest.raises(BatchNormError, match=r"no layout is called 'vgg1'.*did you mean 'vgg1[16]'.*\[\[16, 16\]"):
        VGG(layout="vgg1")


def test_where_dropout_is():
    def places(network):
        return [name for name, module in network.named_modules() if isinstance(module, nn.Dropout)]

    assert places(MLP(widths=(8, 8), dropout=0.1)) == ["hidden.0.dropout", "hidden.1.dropout"]
    assert places(VGG(hidden_widths=(8,), dropout=0.1)) == ["hidden.0.dropout"]
    assert places(VGG(dropout=0.1)) == ["dropout"]
    assert places(ResidualNetwork(dropout=0.1)) == ["dropout"]
    assert [places(kind()) for kind in (MLP, VGG, ResidualNetwork)] == [[], [], []]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("MLP", {"widths": [8], "norm": "ghost", "norm_options": {"virtual_batch_size": 4}, "affine": "scale"}),
        ("DeepLinearNetwork", {"depth": 3, "norm": None, "affine": False}),
        ("VGG", {"layout": [[4], [8]], "norm_place": "after", "activation": "maxout", "dropout": 0.5}),
        ("VGG", {"layout": "vgg11", "hidden_widths": [16]}),
        ("ResidualNetwork", {"preactivation": True, "skip_init": 0.5, "norm": None, "init": "orthogonal"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_configuration_file_can_say_it(kind, options):
    def take(network: nn.Module) -> nn.Module:
        return network

    given = {"class_path": f"bn_lightning.networks.{kind}", "init_args": options}
    made = auto_cli(take, args=["--network", json.dumps(given)], as_positional=False)
    assert str(made) == str(getattr(networks, kind)(**options))


def test_unknown_names_and_options_get_the_nearest_one():
    with pytest.raises(BatchNormError, match="did you mean 'residual'"):
        build_network("resdual")
    with pytest.raises(BatchNormError, match="there are 'deep_linear', 'mlp', 'residual', 'vgg'"):
        build_network("xyz")
    with pytest.raises(
        BatchNormError, match=r"'mlp' has no option 'width' \(did you mean 'widths'\?\); it takes in_feat"
    ):
        build_network("mlp", width=(8,))
