"""Initial weights by the closed forms of their moments; LSUV by what the layers put out."""

import pytest
import torch
from torch import nn

from bn_lightning.errors import BatchNormError
from bn_lightning.networks import MLP, VGG, DeepLinearNetwork, ResidualNetwork, lsuv_
from bn_lightning.networks.initialization import initialize_

CONV, LINEAR = lambda: nn.Conv2d(32, 64, 3), lambda: nn.Linear(300, 200)


@pytest.mark.parametrize(
    ("build", "init", "variance"),
    [
        pytest.param(LINEAR, "he", 2 / 300, id="linear he"),
        pytest.param(LINEAR, "he_fan_out", 2 / 200, id="linear he_fan_out"),
        pytest.param(LINEAR, "glorot", 2 / 500, id="linear glorot"),
        pytest.param(CONV, "he", 2 / (32 * 9), id="conv he"),
        pytest.param(CONV, "he_fan_out", 2 / (64 * 9), id="conv he_fan_out"),
        pytest.param(CONV, "glorot", 2 / (96 * 9), id="conv glorot"),
    ],
)
def test_variances(build, init, variance):
    torch.manual_seed(0)
    layer = build()
    initialize_(layer, init)
    weight = layer.weight.detach().double()
    assert weight.square().mean().item() == pytest.approx(variance, rel=0.05)
    assert abs(weight.mean()) < 5 * (variance / weight.numel()) ** 0.5
    assert not layer.bias.any()
    kurtosis = (weight**4).mean() / weight.square().mean() ** 2
    assert kurtosis.item() == pytest.approx(1.8 if init == "glorot" else 3.0, rel=0.05), "uniform, or normal"


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)], ids=["wide", "tall"])
def test_orthogonal(shape):
    for layer in (nn.Linear(shape[1], shape[0]), nn.Conv2d(shape[1], shape[0], 1), nn.Conv2d(1, 4, 3)):
        initialize_(layer, "orthogonal")
        matrix = layer.weight.detach().flatten(1)
        gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
        torch.testing.assert_close(gram, torch.eye(len(gram)), atol=1e-5, rtol=0)


def test_heads_follow_but_for_hes_rule():
    """Nothing rectifies them: torch's own is uniform in ±1 / √n_in, a sixth of He's variance."""
    torch.manual_seed(0)
    variances = {init: MLP(8, 400, widths=(200,), init=init).head.weight.var().item() for init in ("he", "glorot")}
    assert variances["he"] == pytest.approx(1 / (3 * 200), rel=0.05)
    assert variances["glorot"] == pytest.approx(2 / 600, rel=0.05)


IMAGES = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 3 + 1
NETWORKS = {
    "mlp": lambda **knobs: MLP(64, widths=(32, 32, 32), dropout=0.5, **knobs),
    "vgg": lambda **knobs: VGG(layout=((8, 8), (16,)), hidden_widths=(16,), dropout=0.5, **knobs),
    "residual": lambda **knobs: ResidualNetwork(widths=(8, 16), blocks=1, **knobs),
    "pre-activation": lambda **knobs: ResidualNetwork(widths=(8, 16), blocks=1, preactivation=True, **knobs),
    "deep linear": lambda **knobs: DeepLinearNetwork(64, depth=6, **{"norm": knobs.get("norm", "batch")}),
}
WEIGHTED = (nn.Linear, nn.Conv2d)


def outputs(network):
    """Return each weighted layer's output, with the norms on the batch and no dropout."""
    seen, hooks = {}, []
    for name, module in network.eval().named_modules():
        module.training = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if isinstance(module, WEIGHTED):
            hooks.append(module.register_forward_hook(lambda *a, name=name: seen.__setitem__(name, a[2].clone())))
    network(IMAGES)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    "knobs",
    [{}, {"norm": None}, {"norm_place": "after"}, {"norm": "ghost"}, {"activation": "sigmoid", "norm": None}],
    ids=["before", "none", "after", "ghost", "sigmoid"],
)
def test_lsuv_gives_each_layer_unit_variance(name, knobs):
    torch.manual_seed(0)
    network = NETWORKS[name](**knobs)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    state = torch.get_rng_state()
    lsuv_(network, IMAGES)
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training
    assert all(module.training for module in network.modules())
    weighted = {name for name, module in network.named_modules() if isinstance(module, WEIGHTED)}
    for key, value in network.state_dict().items():
        if key.rpartition(".")[0] not in weighted:
            assert torch.equal(value, before[key]), f"{key} is no weight to initialize"
    seen = outputs(network)
    assert seen.keys() == weighted
    for layer, output in seen.items():
        assert output.double().var(correction=0).item() == pytest.approx(1, abs=1e-3), layer


def test_lsuv_scales_orthonormal_weights_and_clears_biases():
    network = MLP(64, widths=(32,), norm=None)
    nn.init.normal_(network.hidden[0].linear.bias)
    lsuv_(network, IMAGES)
    for layer in (network.hidden[0].linear, network.head):
        gram = layer.weight.detach() @ layer.weight.detach().T
        torch.testing.assert_close(gram / gram[0, 0], torch.eye(len(gram)), atol=1e-5, rtol=0)
        assert not layer.bias.any()


class Tied(nn.Module):
    """Uses one layer twice, and its weight in another one too."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(self.first(x)).relu())


def test_a_weight_that_is_used_again_is_scaled_once():
    network, x = Tied(), torch.randn(32, 8) * 5
    lsuv_(network, x)
    assert network.first(x).var(correction=0).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("build", "images", "message"),
    [
        pytest.param(lambda: MLP(4), torch.zeros(8, 4), "'hidden.0.linear'.*deviation of 0.*not all zero", id="zeros"),
        pytest.param(lambda: MLP(4), torch.full((8, 4), torch.nan), "deviation of nan", id="nan"),
        pytest.param(nn.ReLU, torch.zeros(2, 2), "ReLU has no linear layer", id="nothing"),
        pytest.param(
            lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))),
            torch.randn(8, 4),
            "'0' .*Remove the parametrization",
            id="parametrized",
        ),
    ],
)
def test_after_an_error_the_network_is_as_it_was(build, images, message):
    network = build()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(BatchNormError, match=message):
        lsuv_(network, images)
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(module.training and not module._forward_hooks for module in network.modules())


def test_a_layer_that_does_not_run_is_named():
    network = MLP(64, widths=(8,))
    network.spare = nn.Linear(2, 2)
    with pytest.raises(BatchNormError, match="did not reach spare"):
        lsuv_(network, IMAGES)
