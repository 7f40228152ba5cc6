"""Taps inside torch.compile: they fire, toggle, break no graph and change nothing."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import bn_lightning as bnl
from bn_lightning.monitoring import ActivationWatch

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # torch's own reading of it
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),  # Inductor's own imports
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 3), nn.Tanh()
    )


class Graphs:
    """A backend that counts the graphs it is given, for `torch._dynamo.testing.CompileCounter` runs them too."""

    def __init__(self, backend):
        self.number, self._compile = 0, torch._dynamo.lookup_backend(backend)

    def __call__(self, graph, inputs):
        self.number += 1
        return self._compile(graph, inputs)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_taps_fire_and_toggle_in_one_graph_each(backend):
    net, reference, graphs = network(), network(), Graphs(backend)
    watch = ActivationWatch()
    watch.install(net)
    compiled = torch.compile(net, backend=graphs, fullgraph=True)  # fullgraph: a break is an error
    counts = []
    for step, sampled in enumerate((True, False, True, False, True)):
        watch.sampling = sampled
        x = draw(5, 2, 6, 6, seed=step)
        compiled(x).sum().backward()
        with bnl.observe_activations(reference) as expected:
            reference(x).sum().backward()
        rows = watch.flush().to_dict()
        counts.append(rows["1"]["count"])
        for name, row in expected.to_dict().items() if sampled else ():
            found = [rows[name][field] for field in ("count", "mean", "std", "min", "max", "zero_fraction", "channels")]
            wanted = [row[field] for field in ("count", "mean", "std", "min", "max", "zero_fraction", "channels")]
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6, err_msg=name)
    assert counts == [320, 0, 320, 0, 320]
    assert graphs.number == 2  # one with taps and one without
    assert list(rows) == ["0", "1", "2", "3", "4", "5"]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_training_is_bitwise_unchanged(backend):
    def train(sampling):
        torch.compiler.reset()
        net = network()
        watch = ActivationWatch(gradients=True)
        watch.install(net)
        watch.sampling = sampling
        compiled, optimizer = torch.compile(net, backend=backend), torch.optim.SGD(net.parameters(), lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            compiled(draw(5, 2, 6, 6, seed=step)).square().sum().backward()
            optimizer.step()
        return [tensor.clone() for tensor in net.state_dict().values()]

    assert all(torch.equal(one, other) for one, other in zip(train(True), train(False), strict=True))


def test_in_place_and_around_a_graph_break():
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.after = nn.Linear(4, 3), nn.ReLU()

        def forward(self, x):
            x = self.before(x)
            torch._dynamo.graph_break()
            return self.after(x)

    net = Breaks()
    net.compile(backend="eager")
    with bnl.observe_activations(net) as activations:
        net(draw(6, 4))
    assert [row["count"] for row in activations.to_dict().values()] == [18, 18]


def test_the_number_of_layers_is_not_limited_by_recompilation():
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(20))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
                torch._dynamo.graph_break()
            return x

    net = Steps()
    with bnl.observe_activations(net) as activations:
        torch.compile(net, backend="eager")(draw(3, 2))
    assert [row["count"] for row in activations.to_dict().values()] == [6] * 20


def test_equal_blocks_share_their_graphs():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.act = nn.Linear(2, 2), nn.ReLU()

        def forward(self, x):
            return self.act(self.layer(x))

    blocks, graphs = nn.Sequential(*(Block() for _ in range(12))), Graphs("aot_eager")
    watch = ActivationWatch()
    watch.install(blocks)
    for block in blocks:
        block.compile(backend=graphs, fullgraph=True)  # beyond eight graphs that is an error
    counts = []
    for sampled in (True, False, True):
        watch.sampling = sampled
        blocks(draw(3, 2)).sum().backward()
        counts.append([row["count"] for row in watch.flush().to_dict().values()])
    assert counts == [[6] * 24, [0] * 24, [6] * 24]
    assert graphs.number <= 6  # with and without taps, and the first block's input needs no gradient


def test_what_cannot_be_told_inside_a_graph_has_its_reason():
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU())
    watch = ActivationWatch(gradients=True)
    watch.install(net)
    watch.sampling = True
    output = torch.compile(net, backend="eager")(draw(2, 5, 3))
    output.sum().backward()
    snapshot = watch.flush()
    rows, values = snapshot.to_dict(), output.detach().double().numpy()
    assert (rows["0"]["channels"], rows["1"]["channels"]) == (6, 1)
    assert "which axis holds its channels is not known" in rows["1"]["reason"]
    np.testing.assert_allclose([rows["1"]["mean"], rows["1"]["std"]], [values.mean(), values.std()], rtol=1e-5)
    assert [row["reason"] for row in snapshot.gradients.to_dict().values()] == [
        "torch.compile lets no gradient out of its graphs"
    ] * 2


def test_taps_set_after_the_first_run_are_missed_and_told():
    net = network()
    compiled = torch.compile(net, backend="eager")
    compiled(draw(2, 2, 6, 6))
    with bnl.observe_activations(compiled) as activations:
        compiled(draw(2, 2, 6, 6))
    assert "none called" in str(activations)
    assert "watch first, then torch.compile" in str(activations)
    torch.compiler.reset()
    with bnl.observe_activations(compiled) as activations:
        compiled(draw(2, 2, 6, 6))
    assert activations.to_dict()["1"]["count"] == 128


@pytest.mark.parametrize(
    ("reentrant", "backend"),
    [
        pytest.param(False, None, id="non-reentrant"),
        pytest.param(True, None, id="reentrant"),
        pytest.param(False, "aot_eager", id="compiled"),
    ],
)
def test_what_checkpointing_recomputes_is_not_counted_twice(reentrant, backend):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
            self.head = nn.Linear(4, 1)

        def forward(self, x):
            return self.head(checkpoint(self.body, x, use_reentrant=reentrant))

    torch.manual_seed(0)
    net, x = Checkpointed(), draw(6, 4).requires_grad_()
    watch = ActivationWatch(gradients=backend is None)
    watch.install(net)
    watch.sampling = True
    (torch.compile(net, backend=backend) if backend else net)(x).sum().backward()
    snapshot = watch.flush()
    assert {name: row["count"] for name, row in snapshot.to_dict().items()} == {
        "body.0": 24,
        "body.1": 24,
        "body.2": 24,
        "head": 6,
    }
    if backend is None:
        assert [row["count"] for row in snapshot.gradients.to_dict().values()] == [24, 24, 24, 6]
        back = net.head.weight.detach().double().expand(6, 4)
        np.testing.assert_allclose(snapshot.gradients.channels("body.2").mean, back.mean(0), rtol=1e-6)
