"""Taps: what they measure, what they leave alone, and that they never wait for the device."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

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


def test_every_layer_of_several_calls_matches_numpy():
    net, batches = network(), [draw(n, 3, 8, 8, seed=n) for n in (4, 1, 7)]
    with bnl.observe_activations(net) as activations:
        for batch in batches:
            net(batch)
    outputs, reference = {}, network().train()
    for batch in batches:  # layer by layer, without hooks; in-place ReLU must not have changed what BN put out
        x = batch
        for name, layer in reference.named_children():
            x = layer(x)
            outputs.setdefault(name, []).append(x.detach().double().numpy().copy())
    assert list(activations.to_dict()) == ["0", "1", "2", "3", "5"]
    for name in ("0", "1", "2", "3"):  # what follows dropout is random
        values = np.concatenate(outputs[name])
        row, channels = activations.to_dict()[name], activations.channels(name)
        assert (row["count"], row["zero_fraction"]) == (values.size, (values == 0).mean())
        expected = [values.mean(), values.std(), values.min(), values.max(), np.sqrt(np.square(values).mean())]
        np.testing.assert_allclose(
            [row[k] for k in ("mean", "std", "min", "max", "rms")], expected, rtol=1e-5, atol=1e-7
        )
        axes = tuple(axis for axis in range(values.ndim) if axis != 1)
        np.testing.assert_allclose(channels.std, values.std(axes), rtol=1e-5)
        np.testing.assert_allclose(channels.mean, values.mean(axes), rtol=1e-5, atol=1e-7)


def test_a_flush_begins_a_new_sample_and_a_read_does_not():
    net, watch = nn.Sequential(nn.ReLU()), ActivationWatch()
    watch.install(net)
    watch.sampling = True
    counts = []
    for x, look in ((draw(2, 3), watch.read), (draw(4, 3), watch.flush), (draw(5, 3), watch.flush)):
        net(x)
        counts.append(look().to_dict()["0"]["count"])
    assert counts == [6, 18, 15]
    assert watch.flush().to_dict()["0"]["reason"] == "not called"


def test_nothing_is_measured_between_samples():
    net, watch = nn.Sequential(nn.ReLU()), ActivationWatch()
    watch.install(net)
    x = draw(2, 3)
    with Operations() as operations:
        net(x)
    assert operations.names == ["aten::relu"]
    assert watch.flush().to_dict()["0"]["count"] == 0


class Operations(TorchDispatchMode):
    """Records the operations that reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def test_hooks_never_read_a_value_on_the_host(monkeypatch):
    # A meta tensor has no values: every way to read one, or to copy it to the host, raises.
    monkeypatch.setattr("bn_lightning.monitoring.watch.unmeasurable", lambda tensor: "")
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).to("meta")
    watch = ActivationWatch()
    watch.install(net)
    watch.sampling = True
    with Operations() as operations:
        for batch in (2, 2, 3):
            net(torch.empty(batch, 3, 8, 8, device="meta"))
    assert len(operations.names) > 200
    assert not {"aten::_local_scalar_dense", "aten::item", "aten::nonzero"} & set(operations.names)
    assert watch._buffer.used.shape == (7, 4 + 4 + 4 + 144 + 5)
    with pytest.raises(NotImplementedError, match="meta"):
        watch.flush()  # the proof that a read would have raised


def test_a_flush_is_one_copy_whatever_the_number_of_layers(monkeypatch):
    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(30)))
    watch, copies = ActivationWatch(), []
    watch.install(net)
    watch.sampling = True
    for name in ("cpu", "item", "tolist", "numpy", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"{name} in a hook"))
    net(draw(2, 3))
    monkeypatch.undo()
    to_host = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(tuple(self.shape)) or to_host(self))
    watch.flush()
    assert copies == [(7, 90)]


@pytest.mark.parametrize(
    "buffer_type",
    [pytest.param(torch.bfloat16, id="bfloat16"), pytest.param(torch.float16, id="float16")],
)
def test_autocast_does_not_reach_the_statistics(buffer_type):
    net, x = nn.Sequential(nn.Linear(64, 8)), draw(100, 64)
    with bnl.observe_activations(net) as activations, torch.autocast("cpu", dtype=buffer_type):
        output = net(x)
    assert output.dtype == buffer_type
    np.testing.assert_allclose(activations.channels("0").std, output.detach().double().numpy().std(0), rtol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_samples_may_mix_gradient_modes(mode):
    net = nn.Sequential(nn.Linear(3, 2))
    with bnl.observe_activations(net) as activations:
        with mode():
            net(draw(2, 3))
        net(draw(2, 3)).sum().backward()
        with mode():
            net(draw(2, 3))
            inside = activations.to_dict()["0"]["count"]
    assert (inside, activations.to_dict()["0"]["count"]) == (12, 12)


def test_shared_modules_merge_and_keep_channel_counts_apart():
    relu = nn.ReLU()
    net = nn.Sequential(nn.Linear(3, 2), relu, nn.Linear(2, 4), relu)
    x = draw(6, 3)
    with bnl.observe_activations(net) as activations:
        net(x)
    one = net[1](net[0](x))
    two = net[3](net[2](one))
    expected = np.concatenate([one.detach().double().numpy().ravel(), two.detach().double().numpy().ravel()])
    row = activations.to_dict()["1"]
    assert (row["count"], row["channels"]) == (36, 6)
    np.testing.assert_allclose([row["mean"], row["std"]], [expected.mean(), expected.std()], rtol=1e-6)


def test_the_buffer_grows_without_losing_what_it_holds():
    net = nn.Sequential(*(nn.Sequential(nn.Linear(3, width), nn.Linear(width, 3)) for width in (1500, 3000, 9000)))
    x = draw(4, 3)
    with bnl.observe_activations(net) as activations:
        net(x)
        net(x)
    for index, pair in enumerate(net):
        for child, layer in enumerate(pair):
            x = layer(x)
            channels = activations.channels(f"{index}.{child}")
            np.testing.assert_allclose(channels.mean, x.detach().double().mean(0), rtol=1e-4, atol=1e-6)
            assert channels.count.unique().tolist() == [8]


def test_ever_new_channel_counts_do_not_grow_the_buffer_for_ever():
    net = nn.Sequential(nn.ReLU())
    with bnl.observe_activations(net) as activations:
        for length in range(1, 200):
            net(torch.ones(2, length, 3, 1))
    row = activations.to_dict()["0"]
    assert row["count"] == 6 * sum(range(1, 200))
    assert row["channels"] <= 8 * 9
    assert "after 8 different channel counts" in row["reason"]


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


def test_a_copy_of_a_watched_network_is_not_watched():
    net = nn.Sequential(nn.ReLU())
    with bnl.observe_activations(net) as activations:
        other, x = copy.deepcopy(net), draw(2, 3)
        with Operations() as operations:
            other(x)
    assert operations.names == ["aten::relu"]
    assert activations.to_dict()["0"]["count"] == 0


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


def test_a_network_compiled_before_its_taps_were_set_is_told_so():
    torch.compiler.reset()
    net, x = network(), draw(2, 3, 8, 8)
    compiled = torch.compile(net, backend="eager")
    compiled(x)
    with bnl.observe_activations(compiled) as activations:
        compiled(x)
    assert "compiled before the taps were set: watch first" in str(activations)
    assert "compiled before the taps were set: watch first" in activations.to_dict()["0"]["reason"]
    with bnl.observe_activations(net) as activations:
        pass
    assert "compiled" not in str(activations)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own reading of it
def test_a_network_watched_before_it_is_compiled_is_measured():
    torch.compiler.reset()
    net, x = nn.Sequential(nn.Linear(3, 6), nn.ReLU()), draw(2, 5, 3)
    with bnl.observe_activations(net) as activations:
        output = torch.compile(net, backend="eager")(x)
    np.testing.assert_allclose(activations.channels("1").std, output.detach().double().numpy().std((0, 1)), rtol=1e-5)


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
