"""What is watched and what is said of it: layers, outputs that cannot be measured, tables."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import bn_lightning as bnl
from bn_lightning.errors import BatchNormError
from bn_lightning.monitoring import ActivationWatch
from bn_lightning.monitoring.channels import find_tensor
from bn_lightning.monitoring.layers import watchable_layers


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Call(nn.Module):
    """Puts out what a function makes of its input."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def network():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 5)
    )
    net[1].running_mean.copy_(draw(4))
    net[1].running_var.copy_(draw(4).exp())
    net[1].weight.data.copy_(draw(4, seed=1))
    net[1].bias.data.copy_(draw(4, seed=2))
    return net


@dataclasses.dataclass
class Output:
    index: torch.Tensor
    logits: torch.Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda x: (x, None), id="tuple"),
        pytest.param(lambda x: [torch.tensor(1), [x]], id="nested list"),
        pytest.param(lambda x: {"name": "a", "deep": {"x": x}}, id="dict"),
        pytest.param(lambda x: Output(torch.tensor(1), x), id="dataclass"),
    ],
)
def test_the_first_floating_tensor_is_found(wrap):
    with bnl.observe_activations(Call(wrap)) as activations:
        activations_of = activations  # the name inside the block is the observation itself
        Call(wrap)  # another instance is not watched
    assert activations_of.to_dict()["(root)"]["reason"] == "not called"
    net, x = Call(wrap), draw(4, 3)
    with bnl.observe_activations(net) as activations:
        net(x)
    np.testing.assert_allclose(activations.to_dict()["(root)"]["mean"], x.double().mean(), rtol=1e-6)
    assert find_tensor(wrap(x)) is x


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(lambda x: "text", "holds no tensor (str)", id="no tensor"),
        pytest.param(lambda x: x.to(torch.complex64), "complex64", id="complex"),
        pytest.param(lambda x: x.to("meta"), "device meta", id="meta"),
        pytest.param(lambda x: x.to_sparse(), "sparse_coo", id="sparse"),
    ],
)
def test_what_cannot_be_measured_is_a_row_with_its_reason(make, reason):
    net = Call(make)
    with bnl.observe_activations(net) as activations:
        net(draw(4, 3))
    row = activations.to_dict()["(root)"]
    assert reason in row["reason"]
    assert row["count"] == 0
    assert reason in str(activations.table())


@pytest.mark.parametrize(
    ("make", "count"),
    [
        pytest.param(lambda x: x.sum(), 1, id="0-d"),
        pytest.param(lambda x: x[:0], 0, id="empty"),
        pytest.param(lambda x: x.long(), 12, id="integers"),
        pytest.param(lambda x: x > 0, 12, id="booleans"),
    ],
)
def test_odd_tensors_are_measured(make, count):
    net = Call(make)
    with bnl.observe_activations(net) as activations:
        net(draw(4, 3))
    row = activations.to_dict()["(root)"]
    assert (row["count"], row["reason"]) == (count, "")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(torch.jit.script, id="script"),
        pytest.param(lambda block: torch.jit.trace(block, draw(2, 3)), id="trace"),
    ],
)
def test_a_torch_jit_layer_is_one_row_with_its_reason(make):
    net = nn.Sequential(nn.Linear(3, 3), make(nn.Sequential(nn.Linear(3, 3), nn.Tanh())), nn.ReLU())
    with bnl.observe_activations(net) as activations:
        net(draw(4, 3))
    rows = activations.to_dict()
    assert list(rows) == ["0", "2", "1"]
    assert [row["count"] for row in rows.values()] == [12, 12, 0]
    assert "compiled by torch.jit" in rows["1"]["reason"]
    assert str(activations.table()).startswith("activations of 3 layers, in order")
    with bnl.observe_activations(net, include=("1",)) as activations:
        net(draw(4, 3))
    assert "compiled by torch.jit" in str(activations)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt], ids=lambda error: error.__name__)
def test_taps_are_gone_after_an_exception(error):
    net = network()
    before = [dict(module._forward_hooks) for module in net.modules()]
    with pytest.raises(error), bnl.observe_activations(net):
        raise error
    assert [dict(module._forward_hooks) for module in net.modules()] == before


def test_only_our_taps_are_removed():
    net = network()
    handle = net[0].register_forward_hook(lambda *_: None)
    with bnl.observe_activations(net):
        pass
    assert list(net[0]._forward_hooks) == [handle.id]


def test_observing_changes_nothing():
    def train(watched):
        torch.manual_seed(0)
        net = network()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        losses = []
        watch = ActivationWatch()
        if watched:
            watch.install(net)
            watch.sampling = True
        for _ in range(3):
            optimizer.zero_grad()
            loss = net(torch.randn(4, 3, 8, 8)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return [*losses, *net.state_dict().values(), torch.get_rng_state()]

    assert all(torch.equal(one, other) for one, other in zip(train(False), train(True), strict=True))


class Metric(nn.Module):
    """Looks like a torchmetrics Metric."""

    update = compute = reset = forward = lambda self, *_: torch.zeros(())


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        pytest.param((), (), ["body.0", "body.1", "head"], id="default"),
        pytest.param(("body*",), (), ["body.0", "body.1"], id="a pattern picks leaves"),
        pytest.param(("body",), (), ["body"], id="a full name picks a block"),
        pytest.param((), ("*.0", "head"), ["body.1"], id="exclude"),
        pytest.param(("drop",), (), ["drop"], id="a full name picks what the default leaves out"),
    ],
)
def test_which_layers_are_watched(include, exclude, expected):
    net = nn.ModuleDict(
        {
            "body": nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Sequential()),
            "drop": nn.Dropout(),
            "skip": nn.Identity(),
            "head": nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
            "loss": nn.CrossEntropyLoss(),
            "accuracy": Metric(),
        }
    )
    assert list(watchable_layers(net, include, exclude)) == expected


def test_a_pattern_that_matches_nothing_raises_and_leaves_no_tap():
    net = network()
    with pytest.raises(BatchNormError, match="encoder"), bnl.observe_activations(net, include=("encoder.*",)):
        pytest.fail("entered the block")
    assert not any(module._forward_hooks for module in net.modules())


def test_patterns_that_leave_nothing_are_refused():
    with pytest.raises(BatchNormError, match="leave no layer of Sequential to watch"):
        watchable_layers(network(), exclude=("*",))


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_bare_string_is_refused(option):
    with pytest.raises(BatchNormError, match=rf"{option}= takes a list.*\['0\*'\]"):
        watchable_layers(network(), **{option: "0*"})


def test_a_network_called_outside_the_block_is_told_so_in_one_line():
    net = network()
    with bnl.observe_activations(net) as activations:
        pass
    net(draw(2, 3, 8, 8))
    lines = str(activations).splitlines()
    assert lines[0] == "activations of 5 layers, none called"
    assert lines[-1] == "the model was not called inside the with block"
    assert len(lines) == 4
    assert [row["reason"] for row in activations.to_dict().values()] == ["not called"] * 5
    with pytest.raises(BatchNormError, match="none of the 5 watched layers"):
        activations.figure()


def test_a_network_without_a_layer_to_watch_is_no_error_until_it_is_drawn():
    net = nn.Identity()
    with bnl.observe_activations(net) as activations:
        net(draw(2, 3))
    assert str(activations).splitlines()[0] == "activations of 0 layers, none called"
    assert str(activations).splitlines()[-1] == "there is no layer to watch"
    with pytest.raises(BatchNormError, match="nothing to draw"):
        activations.figure()


def test_an_unknown_layer_is_named():
    net = network()
    with bnl.observe_activations(net) as activations:
        net(draw(2, 3, 8, 8))
    with pytest.raises(BatchNormError, match=r"'conv9'.*'0', '1'"):
        activations.channels("conv9")


def test_table_lists_layers_in_order_of_execution_with_remarks_and_draws_figures():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first, self.never = nn.ReLU(), nn.Linear(3, 4), nn.Linear(1, 1)

        def forward(self, x):
            return self.last(self.first(x))

    net = Backwards()
    net.first.weight.data.zero_()
    net.first.bias.data.copy_(torch.tensor([-1.0, 1.0, 2.0, 3.0]))
    with bnl.observe_activations(net) as activations:
        net(draw(5, 3))
    assert list(activations.to_dict()) == ["first", "last", "never"]
    lines = str(activations.table()).splitlines()
    assert lines[0] == "activations of 3 layers, 2 called, in order of execution"
    assert lines[-1] == "layers with a remark: 2 of 3"
    assert "1 of 4 channels zero" in lines[4]
    assert lines[5].split() == ["never", *"–" * 5, "0", "not", "called"]
    assert activations._repr_html_().count("<tr>") == 4
    assert activations.figure().get_axes()
    with pytest.raises(BatchNormError, match="kurtosis"):
        activations.figure("kurtosis")


def test_of_several_tensors_the_first_is_measured_and_the_others_are_told():
    class Two(nn.Module):
        def forward(self, x):
            return {"a": x, "b": x + torch.inf}

    net = nn.Sequential(Two())
    with bnl.observe_activations(net) as activations:
        net(draw(4, 3))
    row = activations.to_dict()["0"]
    assert (row["count"], row["nonfinite"]) == (12, 0)
    assert row["reason"] == "only the first tensor of its output is measured, 1 other not"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(lambda x: [].append, "no tensor", id="a method"),
        pytest.param(lambda x: FakeTensorMode().from_tensor(x), "its output is a FakeTensor", id="fake"),
        pytest.param(lambda x: endless([x]), "could not be measured: RecursionError", id="a list that holds itself"),
    ],
)
def test_outputs_that_nobody_thought_of_are_rows_with_a_reason(make, reason):
    class Odd(nn.Module):
        def forward(self, x):
            return make(x)

    with bnl.observe_activations(net := Odd()) as activations:
        net(draw(2, 3))
    (row,) = activations.to_dict().values()
    assert row["count"] == 0
    assert reason in row["reason"]


def endless(items):
    items.insert(0, items)
    return items


def test_observing_gives_gradients_histograms_and_a_profile_too():
    net, x = network(), draw(2, 3, 8, 8)
    with bnl.observe_activations(net, gradients=True, histograms=True) as activations:
        net(x).sum().backward()
    names = list(activations.to_dict())
    gradients = activations.gradients()
    assert list(gradients.rows) == names
    assert gradients.rows[names[-1]].mean == 1.0, "of a sum"
    histograms = activations.snapshot().histograms
    assert {name: int(histograms[name].sum()) for name in names} == {
        name: row["count"] for name, row in activations.to_dict().items()
    }
    assert activations.profile().axes
    with bnl.observe_activations(net) as without:
        net(x)
    with pytest.raises(BatchNormError, match=r"observe_activations\(…, gradients=True\) does"):
        without.gradients()
