"""Undo is bit for bit, and whatever goes wrong on the way leaves the model as it was."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning import fold_batch_norm, plan_fold
from bn_lightning.errors import BatchNormError, FoldError
from bn_lightning.folding import settle as settle_module
from bn_lightning.folding import surgery as surgery_module


class Interrupted(nn.Module):
    """Passes its input on, and raises in its n-th forward pass."""

    def __init__(self):
        super().__init__()
        self.left = None

    def forward(self, x):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise self.error
        return x


@pytest.fixture
def net(randomize):
    """A network with gradients, a frozen weight, channels_last memory, mixed modes and a layer registered twice."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)
    )
    net.append(Interrupted())
    net.add_module("again", nn.ModuleList([net[1], net[4]]))
    net.again.forward = lambda x: x
    randomize(net).to(memory_format=torch.channels_last)
    net[3].weight.requires_grad_(False)
    net[2].train()
    net[0].weight.grad = torch.randn_like(net[0].weight)
    return net


def test_undo_restores_everything(net, images, fingerprint):
    before = fingerprint(net)
    expected = net(images)
    result = fold_batch_norm(net, images)
    assert fingerprint(net)["state"] != before["state"]
    result.undo()
    assert fingerprint(net) == before
    assert torch.equal(net(images), expected)
    result.undo()
    assert fingerprint(net) == before


def test_undo_works_in_inference_mode_and_training_goes_on(net, images):
    for parameter in net.parameters():
        parameter.requires_grad_(True)
    other = copy.deepcopy(net)
    with torch.inference_mode():
        result = fold_batch_norm(net, images.clone())
        assert isinstance(net[1], nn.Identity)
        result.undo()
    for model in (net, other):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))


def test_unfolded_lends_the_network_out(net, images, fingerprint):
    before = fingerprint(net)
    result = fold_batch_norm(net, images)
    folded = {key: value.clone() for key, value in net.state_dict().items()}
    with result.unfolded() as model:
        assert fingerprint(model) == before
    assert list(net.state_dict()) == list(folded)
    assert all(torch.equal(value, folded[key]) for key, value in net.state_dict().items())
    result.undo()
    assert fingerprint(net) == before


def test_a_copy_leaves_the_model_alone(net, images, fingerprint):
    before = fingerprint(net)
    result = fold_batch_norm(net, images, inplace=False)
    assert fingerprint(net) == before
    assert result.model is not net
    assert isinstance(result.model[1], nn.Identity)
    result.undo()
    assert torch.equal(result.model(images), net(images))
    assert list(result.model.state_dict()) == before["order"]


def test_the_optimizer_still_holds_the_weights(net, images):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    fold_batch_norm(net, images)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert {id(net[0].weight), id(net[3].weight), id(net[3].bias)} <= held


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_failing_in_every_forward_in_turn(net, images, fingerprint, error):
    """Whatever forward pass fails, either the fold is complete and right, or the model is as it was."""
    before, expected = fingerprint(net), net(images)
    endings = []
    for left in range(20):
        net[5].left, net[5].error = left, error
        try:
            result = fold_batch_norm(net, images)
        except (FoldError, BatchNormError, KeyboardInterrupt) as caught:
            endings.append(type(caught).__name__)
        else:
            endings.append(result.report.verified_in)
            net[5].left = None
            torch.testing.assert_close(net(images), expected, rtol=1e-5, atol=1e-5)
            result.undo()
        assert fingerprint(net) == before, f"after failing in forward {left}"
    assert endings[-1] == "float64"
    assert len(set(endings)) > 1


@pytest.mark.parametrize("step", range(30), ids="step={}".format)
def test_an_interrupt_in_the_middle_of_the_surgery(net, images, fingerprint, monkeypatch, step):
    """Interrupt between any two of the writes."""
    before, writes = fingerprint(net), iter(range(10**6))

    def interrupting(function):
        def wrapped(*args, **kwargs):
            if next(writes) == step:
                raise KeyboardInterrupt
            result = function(*args, **kwargs)
            if next(writes) == step:
                raise KeyboardInterrupt
            return result

        return wrapped

    for name in ("_tensor_restorer", "_follower"):
        monkeypatch.setattr(surgery_module, name, interrupting(getattr(surgery_module, name)))
    for name in ("_write", "_replace"):
        monkeypatch.setattr(surgery_module.Surgery, name, interrupting(getattr(surgery_module.Surgery, name)))
    monkeypatch.setattr(surgery_module.Numbers, "apply", interrupting(surgery_module.Numbers.apply))
    with pytest.raises(KeyboardInterrupt):
        fold_batch_norm(net, images)
    assert fingerprint(net) == before


def test_an_error_after_the_fold_takes_it_back(net, images, fingerprint, monkeypatch):
    before = fingerprint(net)
    monkeypatch.setattr(settle_module, "FoldReport", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fold_batch_norm(net, images)
    assert fingerprint(net) == before


@pytest.mark.parametrize("function", [fold_batch_norm, plan_fold], ids=["fold", "plan"])
@pytest.mark.parametrize(
    ("make", "inputs", "words"),
    [
        pytest.param(lambda: nn.Conv2d(6, 4, 3), (2, 6, 5, 5), ["Conv2d has no BatchNorm layer"], id="no-bn"),
        pytest.param(
            lambda: nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)),
            (2, 6, 5, 5),
            ["training mode", r"\(1\)", r"Call \.eval\(\)"],
            id="training",
        ),
        pytest.param(
            lambda: nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)).eval(),
            (2, 5, 5, 5),
            [r"Sequential\.forward", r"float32\[2, 5, 5, 5\]\), '0' \(Conv2d\) raised", "Pass a tensor"],
            id="misfit",
        ),
        pytest.param(
            lambda: nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)).eval().to("meta"),
            (2, 6, 5, 5),
            ["'0.weight' is on the meta device"],
            id="meta",
        ),
    ],
)
def test_what_cannot_be_folded_is_refused_by_name(function, make, inputs, words, fingerprint):
    with pytest.raises(FoldError) as caught:
        function(make(), torch.randn(inputs))
    for word in words:
        caught.match(word)


def test_a_model_that_cannot_be_copied_says_what_to_do(randomize, images):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = randomize(nn.Sequential(nn.utils.weight_norm(nn.Conv2d(6, 4, 3)), nn.BatchNorm2d(4)))
    net(images)
    with pytest.raises(FoldError, match="inplace=True"):
        fold_batch_norm(net, images, inplace=False)


def test_a_lazy_model_is_refused(images):
    net = nn.Sequential(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4)).eval()
    with pytest.raises(BatchNormError, match="lazy"):
        fold_batch_norm(net, images)


def test_frozen_norms_in_a_training_network_are_folded(randomize, images):
    net = randomize(nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)))
    net.train()
    net[1].eval()
    assert fold_batch_norm(net, images).report.rows[0].action == "folded-backward"
    assert not [module for module in net.modules() if isinstance(module, _BatchNorm)]


@pytest.mark.parametrize("folded_in", [True, False], ids=["train", "eval"])
def test_undo_follows_the_mode(randomize, images, folded_in):
    net = randomize(nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)))
    net.training = folded_in  # the layer itself is frozen
    result = fold_batch_norm(net, images)
    net.train(not folded_in)
    result.undo()
    assert (net.training, net[1].training) == (not folded_in, not folded_in)


@pytest.mark.parametrize("change", [nn.Module.double, nn.Module.half, nn.Module.bfloat16], ids=lambda f: f.__name__)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "bare"])
def test_undo_follows_a_cast(randomize, images, change, bias):
    net = randomize(nn.Sequential(nn.Conv2d(6, 4, 3, bias=bias), nn.BatchNorm2d(4), nn.ReLU()))
    expected = change(copy.deepcopy(net)).state_dict()
    result = fold_batch_norm(net, images)
    change(net)
    with result.unfolded():
        assert {key: value.dtype for key, value in net.state_dict().items()} == {
            key: value.dtype for key, value in expected.items()
        }
    result.undo()
    assert list(net.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[key]) for key, value in net.state_dict().items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_undo_follows_a_move(randomize, images):
    net = randomize(nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)))
    expected = net(images)
    result = fold_batch_norm(net, images)
    net.cuda()
    result.undo()
    torch.testing.assert_close(net(images.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)


def test_folding_again_says_so(net, images):
    fold_batch_norm(net, images)
    with pytest.raises(FoldError, match=r"already folded\?"):
        fold_batch_norm(net, images)


@pytest.mark.parametrize("function", [fold_batch_norm, plan_fold], ids=["fold", "plan"])
def test_arguments_the_wrong_way_round(small_net, images, function):
    with pytest.raises(BatchNormError, match=r"expected a torch\.nn\.Module.*Tensor"):
        function(images, small_net)


def test_an_interrupt_between_the_notes_of_a_write(net, images, fingerprint, monkeypatch):
    before, folds = fingerprint(net), surgery_module._FOLDS

    class Interrupting:
        get = folds.get

        def setdefault(self, *args):
            raise KeyboardInterrupt

    monkeypatch.setattr(surgery_module, "_FOLDS", Interrupting())
    with pytest.raises(KeyboardInterrupt):
        fold_batch_norm(net, images)
    assert fingerprint(net) == before
