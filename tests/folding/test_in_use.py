"""A folded network in use: trained, under autocast, in a graph, folded twice."""

import copy
import gc
import weakref

import pytest
import torch
from folding.nets import Written, fold_in_float64, rows_of
from torch import nn
from torch.nn.utils import parametrizations, prune

from bn_lightning import fold_batch_norm, plan_fold
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


def test_planning_under_autocast_leaves_it_too(net, images):
    with torch.autocast("cpu", torch.bfloat16):
        assert plan_fold(net, images).rows[0].action == "folded-backward"
        with pytest.raises(FoldError, match="BFloat16"):
            plan_fold(net, images.bfloat16())


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


@pytest.fixture
def two_norms(randomize):
    return randomize(nn.Sequential(nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Tanh()))


def test_the_later_fold_is_undone_first(two_norms, images, fingerprint):
    before = fingerprint(two_norms)
    first = fold_batch_norm(two_norms, images, exclude=["2"])
    between = copy.deepcopy(two_norms.state_dict())
    second = fold_batch_norm(two_norms, images)
    folded = copy.deepcopy(two_norms.state_dict())
    for act in (first.undo, lambda: first.load_unfolded({}), lambda: first.unfolded().__enter__()):
        with pytest.raises(FoldError, match=r"stands on the '0\.weight'"):
            act()
        assert all(torch.equal(tensor, folded[name]) for name, tensor in two_norms.state_dict().items())
    second.undo()
    assert all(torch.equal(tensor, between[name]) for name, tensor in two_norms.state_dict().items())
    first.undo()
    assert fingerprint(two_norms) == before


def test_a_part_that_was_folded_before_the_whole_is_undone_after_it(randomize, images, fingerprint):
    part = nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))
    net = randomize(nn.Sequential(part, nn.BatchNorm2d(4)))
    before = fingerprint(net)
    first, second = fold_batch_norm(part, images), fold_batch_norm(net, images)
    with pytest.raises(FoldError, match="Undo the later fold first"):
        first.undo()
    second.undo()
    first.undo()
    assert fingerprint(net) == before


def test_a_fold_that_nobody_can_take_back_stays_in_the_way(two_norms, images):
    first = fold_batch_norm(two_norms, images, exclude=["2"])
    fold_batch_norm(two_norms, images)
    with pytest.raises(FoldError, match="Undo the later fold first"):
        first.undo()


def test_folds_that_share_no_weight_do_not_mind_each_other(net, images, fingerprint):
    before = fingerprint(net)
    first = fold_batch_norm(net, images)
    net.append(nn.BatchNorm2d(3).eval())
    second = fold_batch_norm(net, images)
    first.undo()
    second.undo()
    del net[4]
    assert fingerprint(net) == before


def test_what_is_undone_or_folded_nothing_is_in_nobodys_way(net, images, fingerprint):
    before = fingerprint(net)
    nothing = fold_batch_norm(net, images, exclude=["1"])
    first = fold_batch_norm(net, images)
    first.undo()
    second = fold_batch_norm(net, images)
    with first.unfolded():
        pass
    first.undo()
    nothing.undo()
    second.undo()
    assert fingerprint(net) == before


def test_networks_that_count_as_equal_are_two(randomize, images):
    class Configured(nn.Sequential):
        def __eq__(self, other):
            return isinstance(other, Configured)

        def __hash__(self):
            return 1

    nets = [randomize(Configured(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))) for _ in range(2)]
    results = [fold_batch_norm(net, images) for net in nets]
    for result in results:
        result.undo()


def test_the_way_back_is_not_copied(net, images, fingerprint):
    result = fold_batch_norm(net, images)
    with pytest.raises(FoldError, match=r"Copy result\.model"):
        copy.deepcopy(result)


@pytest.mark.parametrize("how", ["fused", "data", "affine"])
def test_learning_that_counts_no_version_is_not_lost_either(net, images, how):
    if how == "affine":
        net[0] = nn.ReLU()
        net[1] = nn.BatchNorm2d(6).eval()
        net[3] = nn.Flatten()
    result = fold_batch_norm(net, images, standalone="affine")
    if how == "data":
        net[0].weight.data.mul_(1.01)
    else:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, fused=how == "fused")
        net(images).square().sum().backward()
        optimizer.step()
    learned = copy.deepcopy(net.state_dict())
    with pytest.raises(FoldError, match="was changed since it was folded"), result.unfolded():
        pytest.fail("lent out")
    assert all(torch.equal(tensor, learned[name]) for name, tensor in net.state_dict().items())


def test_loading_the_same_values_changes_nothing(net, images):
    result = fold_batch_norm(net, images)
    net.load_state_dict(copy.deepcopy(net.state_dict()))
    with result.unfolded():
        assert isinstance(net[1], nn.BatchNorm2d)


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


def test_a_network_built_in_inference_mode_is_refused(images):
    with torch.inference_mode():
        net = nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)).eval()
        for function in (plan_fold, fold_batch_norm):
            with pytest.raises(FoldError, match=r"'0\.weight' was made in inference mode.*copy\.deepcopy"):
                function(net, images)
    assert rows_of(fold_batch_norm(copy.deepcopy(net), images)) == {"1": ("folded-backward", "0")}


@pytest.mark.parametrize("index", ["0", "1", "3"])
def test_a_layer_that_was_replaced_is_not_written_to(randomize, images, index):
    net = randomize(nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)))
    net.insert(2, nn.Tanh())
    result = fold_batch_norm(net, images)
    assert [row.action for row in result.report.rows] == ["folded-backward", "folded-forward"]
    replaced = {"0": nn.Conv2d(6, 4, 3), "1": nn.ReLU(), "3": nn.Identity()}[index]
    net[int(index)] = replaced
    before = copy.deepcopy(net.state_dict())
    for act in (lambda: result.unfolded().__enter__(), lambda: result.load_unfolded(before)):
        with pytest.raises(FoldError, match="was replaced since it was folded"):
            act()
        assert list(net.state_dict()) == list(before)
        assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize(
    "change",
    [lambda layer: parametrizations.weight_norm(layer), lambda layer: prune.l1_unstructured(layer, "weight", 0.1)],
    ids=["parametrized", "pruned"],
)
def test_undo_refuses_before_it_begins(net, images, change):
    result = fold_batch_norm(net, images)
    change(net[0])
    expected = net(images)
    for act in (result.undo, lambda: result.unfolded().__enter__(), lambda: result.load_unfolded({})):
        with pytest.raises(FoldError, match=r"'0\.weight' is no parameter any more"):
            act()
        assert torch.equal(net(images), expected)
