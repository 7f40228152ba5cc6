"""Paused running statistics stand still; the layers compute what they always do."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import bn_lightning as bnl
from bn_lightning.errors import BatchNormError
from bn_lightning.layers.registry import VARIANTS

PLAIN = {"plain": nn.BatchNorm2d}
KINDS = {**PLAIN, **VARIANTS}


def build(name, **settings):
    layer = KINDS[name](4, **settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for buffer in layer.buffers():
            buffer.copy_(
                torch.rand(buffer.shape, generator=generator) + 0.5 if buffer.is_floating_point() else buffer + 50
            )
    return layer


def images(seed=1):
    return torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("training", [True, False], ids="training={}".format)
@pytest.mark.parametrize("name", KINDS)
def test_nothing_moves_and_the_output_is_the_same(name, training):
    layer = build(name).train(training)
    before, buffers = state(layer), [id(buffer) for buffer in layer.buffers()]
    torch.manual_seed(2)
    with bnl.paused_statistics(layer):
        y = layer(images())
    assert layer.track_running_stats
    assert [id(buffer) for buffer in layer.buffers()] == buffers
    assert same(state(layer), before)
    torch.manual_seed(2)
    assert torch.equal(y, layer(images()))
    assert same(state(layer), before) is (not training or name == "frozen")


def test_renorm_reads_the_same_statistics_in_every_pass():
    layer = build("renorm", r_warmup=None, d_warmup=None)
    with bnl.paused_statistics(layer):
        assert torch.equal(layer(images()), layer(images()))


@pytest.mark.parametrize("name", KINDS)
def test_a_nan_does_not_get_in(name):
    layer = build(name)
    with bnl.paused_statistics(layer):
        layer(images() * torch.inf)
    assert all(value.isfinite().all() for value in state(layer).values())


class StubbornBatchNorm(nn.BatchNorm2d):
    """Moves its statistics come what may, as many a class out there."""

    def forward(self, x):
        self.running_mean.lerp_(x.mean((0, 2, 3)), 0.5)
        return super().forward(x)


@pytest.mark.parametrize("name", [*KINDS, "stubborn"])
def test_it_nests_and_comes_back_after_an_error(name):
    layer = StubbornBatchNorm(4) if name == "stubborn" else build(name)
    before = state(layer)
    with bnl.paused_statistics(layer):
        with bnl.paused_statistics(layer):
            layer(images())
        layer(images())
        with pytest.raises(RuntimeError, match="crash"), bnl.paused_statistics(layer):
            raise RuntimeError("crash")
        layer(images())
    assert same(state(layer), before)
    assert layer.track_running_stats
    layer(images())
    assert same(state(layer), before) is (name == "frozen")


def test_patterns_pick_and_layers_without_statistics_are_left():
    model = nn.Sequential(build("plain"), build("ghost"), nn.BatchNorm2d(4, track_running_stats=False))
    before = state(model)
    with bnl.paused_statistics(model, include=["0", "2"]):
        model(images())
        assert [layer.track_running_stats for layer in model] == [True, True, False]
        assert model[2].running_mean is None
    after = state(model)
    assert same({k: v for k, v in before.items() if k[0] == "0"}, after)
    assert not torch.equal(before["1.running_mean"], after["1.running_mean"])
    assert [layer.track_running_stats for layer in model] == [True, True, False]
    with pytest.raises(BatchNormError, match="matches none"), bnl.paused_statistics(model, exclude=["5"]):
        pass
    with pytest.raises(BatchNormError, match="no BatchNorm layer"), bnl.paused_statistics(nn.ReLU()):
        pass


@pytest.mark.parametrize("early_stop", [True, False], ids="early_stop={}".format)
@pytest.mark.parametrize("name", KINDS)
def test_activation_checkpointing_counts_once(name, early_stop):
    options = {"r_warmup": None, "d_warmup": None} if name == "renorm" else {}
    once, twice, paused = (nn.Sequential(nn.Conv2d(4, 4, 1), build(name, **options), nn.ReLU()) for _ in range(3))
    for other in (twice, paused):
        other.load_state_dict(once.state_dict())

    def second_paused():
        return nullcontext(), bnl.paused_statistics(paused)

    def first_paused():
        return bnl.paused_statistics(paused), nullcontext()

    torch.manual_seed(3)
    once(images()).square().sum().backward()
    with set_checkpoint_early_stop(early_stop):
        checkpoint(twice, images(), use_reentrant=False).square().sum().backward()
        assert same(state(twice), state(once)) is (name == "frozen")  # what it is for
        torch.manual_seed(3)
        context_fn = first_paused if name == "renorm" else second_paused
        y = checkpoint(paused, images(), use_reentrant=False, context_fn=context_fn)
        y.square().sum().backward()
    assert same(state(paused), state(once))
    for p, q in zip(paused.parameters(), once.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("name", ["plain", "ghost", "domain"])
def test_compiled_code_follows(name):
    torch._dynamo.reset()
    model = nn.Sequential(build(name))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    y = compiled(images())
    before = state(model)
    with bnl.paused_statistics(compiled, include=["0"]):
        torch.testing.assert_close(compiled(images()), y)
    assert same(state(model), before)
    compiled(images())
    assert int(model[0].num_batches_tracked) == int(before["0.num_batches_tracked"]) + 1


@pytest.mark.parametrize("name", [None, *sorted(VARIANTS)])
def test_evaluation_in_between_goes_by_the_statistics_there_were(name):
    layer = nn.BatchNorm1d(3) if name is None else VARIANTS[name](3)
    nn.init.constant_(layer.running_mean, 0.25), nn.init.constant_(layer.num_batches_tracked, 50)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)) + 5
    expected = layer.eval()(x)
    with bnl.paused_statistics(layer):
        layer.train()(x), layer(x)
        assert torch.equal(layer.eval()(x), expected)
    assert torch.equal(layer(x), expected)
    assert layer.momentum == 0.1
