"""An unfolded checkpoint goes into a folded network."""

import copy

import pytest
import torch
import torch.nn.functional as F
from folding.nets import Written
from torch import nn

from bn_lightning import fold_batch_norm
from bn_lightning.errors import FoldError
from bn_lightning.folding.surgery import Surgery


def net(randomize, seed):
    torch.manual_seed(seed)
    layers = (nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    return randomize(nn.Sequential(*layers, nn.BatchNorm2d(2)), seed)


def test_it_is_folded_as_the_network_it_came_from_would_be(randomize, images, fingerprint):
    first, second = net(randomize, 1), net(randomize, 2)
    result = fold_batch_norm(first, images)
    result.load_unfolded(copy.deepcopy(second.state_dict()))
    with torch.no_grad():
        torch.testing.assert_close(first(images), second(images), rtol=1e-4, atol=1e-5)
    assert isinstance(first[1], nn.Identity)
    fresh = copy.deepcopy(second)
    fold_batch_norm(fresh, images)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), fresh.state_dict().values(), strict=True))
    result.undo()
    assert fingerprint(first)["state"] == fingerprint(second)["state"]


def test_what_does_not_fit_leaves_the_folded_network(randomize, images):
    model = net(randomize, 1)
    result = fold_batch_norm(model, images)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for state in ({"0.weight": torch.zeros(1)}, dict(before)):
        with pytest.raises(FoldError, match=r"(?s)before it was folded.*(Missing|size mismatch|Unexpected)"):
            result.load_unfolded(state)
        assert list(model.state_dict()) == list(before)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_numbers_that_no_longer_allow_the_fold_are_refused(randomize, images):
    model = randomize(
        Written(lambda n, x: n.bn(F.max_pool2d(n.conv(x), 2)), conv=nn.Conv2d(6, 4, 3), bn=nn.BatchNorm2d(4))
    )
    with torch.no_grad():
        model.bn.weight.abs_()
    unfolded = copy.deepcopy(model.state_dict())
    result = fold_batch_norm(model, images)
    expected = model(images)
    unfolded["bn.weight"][1] = -1.0
    with pytest.raises(FoldError, match=r"'bn' can no longer be folded into conv.*channel 1.*Fold the model anew"):
        result.load_unfolded(unfolded)
    assert torch.equal(model(images), expected)
    result.undo()
    assert model.bn.weight[1] > 0


@pytest.mark.parametrize("step", range(5), ids="step={}".format)
def test_an_interrupt_leaves_the_folded_network(randomize, images, monkeypatch, step):
    model, other = net(randomize, 1), net(randomize, 2)
    result = fold_batch_norm(model, images)
    expected = model(images)
    right, writes = Surgery._write, iter(range(10**6))

    def interrupted(surgery, *args):
        right(surgery, *args)
        if next(writes) == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Surgery, "_write", interrupted)
    if step < 4:
        with pytest.raises(KeyboardInterrupt):
            result.load_unfolded(other.state_dict())
        assert torch.equal(model(images), expected)
    else:
        result.load_unfolded(other.state_dict())
        torch.testing.assert_close(model(images), other(images), rtol=1e-4, atol=1e-5)


def test_a_network_that_leaves_something_out_of_its_state_dict_is_folded_again(randomize):
    """It cannot load what it saves."""

    class Partial(nn.Sequential):
        def state_dict(self, *args, **kwargs):
            state = super().state_dict(*args, **kwargs)
            state.pop("0.bias", None)
            return state

    net = randomize(Partial(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)))
    images = torch.randn(2, 6, 5, 5)
    result = fold_batch_norm(net, images)
    expected = net(images)
    with pytest.raises(FoldError, match=r"Missing key\(s\) in state_dict: .*0\.bias"):
        result.load_unfolded(net.state_dict())
    assert torch.equal(net(images), expected)
    result.undo()
    assert isinstance(net[1], nn.BatchNorm2d)
