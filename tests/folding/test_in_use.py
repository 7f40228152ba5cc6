"""A folded network in use: trained, under autocast, in a graph, folded twice."""

import copy
import gc
import weakref

import pytest
import torch
from folding.nets import Written, fold_in_float64, rows_of
from torch import nn

from bn_lightning import fold_batch_norm
from bn_lightning.errors import FoldError


@pytest.fixture
def net(randomize):
    return randomize(nn.Sequential(nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 3, 1)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad], ids=["no-grad", "grad"])
def test_autocast_goes_on_with_the_present_weights(net, images, mode):
    """It keeps casts of the weights, which folding, undo and unfolded() change."""
    net.requires_grad_(mode is torch.enable_grad)
    other = copy.deepcopy(net)
    with mode(), torch.autocast("cpu", torch.bfloat16):
        before = net(images)
        result = fold_batch_norm(net, images)
        folded = net(images)
        torch.testing.assert_close(folded, before, rtol=0.05, atol=0.05)
        assert not torch.equal(folded, before)
        with result.unfolded():
            assert torch.equal(net(images), before)
        assert torch.equal(net(images), folded)
        loaded = {name: tensor + 0.5 if name == "0.weight" else tensor for name, tensor in other.state_dict().items()}
        result.load_unfolded(loaded)
        other.load_state_dict(loaded)
        torch.clear_autocast_cache()
        torch.testing.assert_close(net(images), other(images), rtol=0.05, atol=0.05)
        result.undo()
        assert torch.equal(net(images), other(images))


def test_folding_under_autocast_verifies_in_the_networks_own_dtype(net, images):
    with torch.autocast("cpu", torch.bfloat16):
        report = fold_batch_norm(net, images).report
    assert (report.verified_in, report.native_dtype) == ("float64", "float32")
    assert report.error <= 1e-12
    assert report.native_error_after <= 1e-5


def test_an_output_in_another_dtype_stays(randomize, images):
    """BN under autocast, or with float32 statistics among half-precision layers, decides on the dtype of its output."""
    net = Written(lambda n, x: n.bn(n.conv(x).bfloat16()).float(), conv=nn.Conv2d(6, 4, 3), bn=nn.BatchNorm2d(4))
    assert rows_of(fold_batch_norm(randomize(net), images)) == {"bn": ("folded-backward", "conv")}

    class Widening(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x.float())

    wide = Written(lambda n, x: n.bn(n.conv(x).bfloat16()), conv=nn.Conv2d(6, 4, 3), bn=Widening(4))
    assert rows_of(fold_batch_norm(randomize(wide), images)) == {"bn": ("kept", "dtype")}


@pytest.mark.parametrize("act", ["fold", "undo"])
def test_a_backward_pass_that_needs_the_old_weights_says_so(net, images, act):
    result = fold_batch_norm(net, images)
    if act == "fold":
        result.undo()
    images.requires_grad_(True)
    loss = net(images).sum()
    if act == "fold":
        fold_batch_norm(net, images)
    else:
        result.undo()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_folding_leaves_gradients_right(net, images):
    """Of the inputs; those of folded weights are in other units."""
    other = copy.deepcopy(net).double()
    fold_in_float64(net, images)
    grads = []
    for model in (net, other):
        x = images.double().requires_grad_(True)
        model(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_the_later_fold_is_undone_first(net, images, fingerprint):
    before = fingerprint(net)
    first = fold_batch_norm(net, images)
    net.append(nn.BatchNorm2d(3).eval())
    second = fold_batch_norm(net, images)
    for act in (first.undo, lambda: first.load_unfolded({}), lambda: first.unfolded().__enter__()):
        with pytest.raises(FoldError, match="Undo the later fold first"):
            act()
    second.undo()
    del net[4]
    first.undo()
    assert fingerprint(net) == before


def test_a_fold_that_nobody_can_take_back_stays_in_the_way(net, images):
    first = fold_batch_norm(net, images)
    net.append(nn.BatchNorm2d(3).eval())
    fold_batch_norm(net, images)
    with pytest.raises(FoldError, match="Undo the later fold first"):
        first.undo()


@pytest.mark.parametrize("how", ["training", "loading"])
def test_what_folded_weights_learned_is_not_lost_on_the_way(net, images, how):
    result = fold_batch_norm(net, images)
    if how == "training":
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        net(images).square().sum().backward()
        optimizer.step()
    else:
        net.load_state_dict({name: tensor + 1 for name, tensor in net.state_dict().items()})
    learned = copy.deepcopy(net.state_dict())
    with pytest.raises(FoldError, match=r"'0\.weight' was changed since it was folded"), result.unfolded():
        pytest.fail("lent out")
    assert all(torch.equal(tensor, learned[name]) for name, tensor in net.state_dict().items())
    result.undo()
    assert isinstance(net[1], nn.BatchNorm2d)


def test_unfolded_again_and_again_keeps_the_parameters(net, images):
    """An optimizer holds the bias that the fold made."""
    result = fold_batch_norm(net, images)
    bias = net[0].bias
    for _ in range(3):
        with result.unfolded():
            assert net[0].bias is None
        assert net[0].bias is bias
    with torch.no_grad():
        bias.add_(1)
    with pytest.raises(FoldError, match=r"'0\.bias' was changed"), result.unfolded():
        pytest.fail("lent out")


def test_a_folded_network_is_let_go(net, images):
    result = fold_batch_norm(net, images)
    watched = weakref.ref(result.model[0])
    other = copy.deepcopy(net)
    kept = fold_batch_norm(nn.Sequential(other[0], nn.BatchNorm2d(4).eval()), images, inplace=False)
    del result, kept, other
    net.pop(0)
    gc.collect()
    assert watched() is None
