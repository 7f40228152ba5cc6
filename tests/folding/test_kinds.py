"""Every kind of layer whose evaluation is one scale and one shift a channel."""

import copy

import pytest
import torch
import torch.nn.functional as F
from folding.nets import Written, fold_in_float64, rows_of
from torch import nn

from bn_lightning import convert_batch_norm, fold_batch_norm, use_domain
from bn_lightning.layers import AdaptiveBatchNorm, ChannelAffine, FrozenBatchNorm
from bn_lightning.layers.registry import VARIANTS

timm_layers = pytest.importorskip("timm.layers")


def images(seed=5):
    return torch.randn(3, 6, 8, 8, generator=torch.Generator().manual_seed(seed))


def behind_a_conv(norm):
    return nn.Sequential(nn.Conv2d(6, 4, 3), norm, nn.Sigmoid())


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("act", [False, True], ids=["bare", "then-activation"])
def test_variants(randomize, variant, act):
    options = {"adaptive": {"alpha": 0.0}}.get(variant, {})
    norm = timm_layers.BatchNormAct2d(4) if act else nn.BatchNorm2d(4)
    net = randomize(behind_a_conv(norm))
    convert_batch_norm(net, variant, **options)
    result = fold_in_float64(net, images(), held_out=[(images(6),)])
    assert rows_of(result) == {"1": ("folded-backward", "0")}
    result.undo()
    assert type(net[1]).__name__.removesuffix("Act") == VARIANTS[variant].__name__


def test_a_frozen_layer_folds_in_training_mode(randomize):
    net = randomize(behind_a_conv(FrozenBatchNorm(4)))
    net[1].train()
    assert rows_of(fold_batch_norm(net, images())) == {"1": ("folded-backward", "0")}


def test_statistics_of_the_batch_do_not_fold(randomize):
    net = randomize(behind_a_conv(AdaptiveBatchNorm(4, alpha=0.5)))
    assert rows_of(fold_batch_norm(net, images(), standalone="affine")) == {"1": ("kept", "no_stats")}


def test_the_domain_at_hand_is_folded(randomize):
    net = randomize(behind_a_conv(nn.BatchNorm2d(4)))
    convert_batch_norm(net, "domain", num_domains=2, per_domain_affine=True)
    with torch.no_grad():
        net[1].other_running_mean.normal_()
        net[1].other_weight_1.normal_()
    other = copy.deepcopy(net)
    with use_domain(net, 1), use_domain(other, 1), torch.no_grad():
        assert rows_of(fold_batch_norm(net, images())) == {"1": ("folded-backward", "0")}
        torch.testing.assert_close(net(images()), other(images()))


@pytest.mark.parametrize("standalone", ["keep", "affine"])
@pytest.mark.parametrize("act", [nn.ReLU, nn.PReLU, None], ids=["relu", "prelu", "none"])
def test_batch_norm_with_drop_and_activation(randomize, standalone, act):
    """timm's BatchNormAct2d keeps both, under their own names."""
    folds = timm_layers.BatchNormAct2d(4, act_layer=act, apply_act=act is not None, drop_layer=nn.Dropout)
    stays = timm_layers.BatchNormAct2d(4, act_layer=nn.SiLU)
    net = randomize(nn.Sequential(nn.Conv2d(6, 4, 3), folds, nn.Tanh(), stays))
    children = (folds.drop, folds.act)
    result = fold_in_float64(net, images(), held_out=[(images(6),)], standalone=standalone)
    assert rows_of(result)["1"] == ("folded-backward", "0")
    assert (net[1].drop, net[1].act) == children
    assert type(net[1]) is nn.Sequential
    if standalone == "affine":
        assert isinstance(net[3].affine, ChannelAffine)
        assert net[3].act is stays.act
    result.undo()
    assert net[1] is folds
    assert net[3] is stays


class HandWritten(nn.Module):
    """As detectron2 and transformers have their frozen BN: buffers, and arithmetic of its own."""

    def __init__(self, channels, wrong=False):
        super().__init__()
        self.wrong = wrong
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        y = x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)
        return y + 1e-3 if self.wrong else y


def test_frozen_layers_that_compute_by_themselves(randomize):
    torchvision = pytest.importorskip("torchvision")
    frozen = torchvision.ops.FrozenBatchNorm2d(4, eps=0.1)
    net = nn.Sequential(nn.Conv2d(6, 4, 3, bias=False), frozen, nn.ReLU(), nn.Conv2d(4, 5, 1), HandWritten(5))
    for name in ("weight", "bias", "running_mean", "running_var"):
        frozen._buffers[name].uniform_(0.5, 1.5)
    result = fold_in_float64(net, images(), held_out=[(images(6),)])
    assert rows_of(result) == {"1": ("folded-backward", "0"), "4": ("folded-backward", "3")}


def test_one_that_does_something_else_is_found_out():
    net = behind_a_conv(HandWritten(4, wrong=True)).eval()
    (row,) = fold_batch_norm(net, images()).report.rows
    assert (row.reason, row.detail) == (
        "subclass",
        "HandWritten has a forward of its own that is not known to be foldable",
    )


def test_a_frozen_layer_takes_another_up(randomize):
    frozen = HandWritten(6)
    net = randomize(Written(lambda n, x: n.bn(n.frozen(x.relu())).tanh(), frozen=frozen, bn=nn.BatchNorm2d(6)))
    kept = {name: value.clone() for name, value in frozen.state_dict().items()}
    result = fold_in_float64(net, images())
    assert rows_of(result)["bn"] == ("merged", "frozen")
    result.undo()
    assert all(torch.equal(value, kept[name].double()) for name, value in frozen.state_dict().items())


def test_lightnings_reverted_sync_batch_norm(randomize):
    from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm

    net = nn.SyncBatchNorm.convert_sync_batchnorm(behind_a_conv(nn.BatchNorm2d(4)))
    sync = randomize(copy.deepcopy(net))
    assert rows_of(fold_in_float64(sync, images())) == {"1": ("folded-backward", "0")}
    reverted = randomize(TorchSyncBatchNorm().revert(net))
    assert rows_of(fold_in_float64(reverted, images())) == {"1": ("folded-backward", "0")}


def test_the_layers_own_eps_is_used(randomize):
    net = randomize(behind_a_conv(nn.BatchNorm2d(4, eps=0.5)))
    assert rows_of(fold_in_float64(net, images())) == {"1": ("folded-backward", "0")}


class Parallel(nn.BatchNorm2d):
    """Two activations side by side, of which one is returned."""

    def __init__(self, channels):
        super().__init__(channels)
        self.one, self.two = nn.ReLU(), nn.Tanh()

    def forward(self, x):
        y = super().forward(x)
        self.one(y)
        return self.two(y)


class Peeking(nn.BatchNorm2d):
    """Runs its activation and returns something else."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.Tanh()

    def forward(self, x):
        y = super().forward(x)
        self.act(y)
        return y


class Gated(HandWritten):
    def forward(self, x):
        return super().forward(x) * self.gate

    gate = torch.ones(1)


class Leaking(HandWritten):
    def forward(self, x):
        self.scaled = x * (self.weight * (self.running_var + 1e-5).rsqrt()).view(1, -1, 1, 1)
        shift = self.bias - self.running_mean * self.weight * (self.running_var + 1e-5).rsqrt()
        return self.scaled + shift.view(1, -1, 1, 1)


class Clamped(HandWritten):
    """An affine of everything but the largest numbers."""

    def forward(self, x):
        return super().forward(x).clamp(-1e12, 1e12)


class WithoutNan(HandWritten):
    def forward(self, x):
        return super().forward(x).nan_to_num()


class Scaling(nn.Module):
    def forward(self, x, factor=1.0):
        return x * factor


class GivingMore(nn.BatchNorm2d):
    """Its child takes more than the normalized values."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = Scaling()

    def forward(self, x):
        return self.act(super().forward(x), 2.0)


class Doubled(FrozenBatchNorm):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "make",
    [Parallel, Peeking, Gated, Leaking, Clamped, WithoutNan, GivingMore, Doubled],
    ids=lambda kind: kind.__name__,
)
@pytest.mark.parametrize("standalone", ["keep", "affine"])
def test_a_forward_of_its_own_that_does_more_stays(randomize, make, standalone):
    net = randomize(behind_a_conv(make(4)))
    result = fold_in_float64(net, images(), standalone=standalone)
    assert rows_of(result) == {"1": ("kept", "subclass")}


def test_children_that_run_in_one_call_only_stay_with_their_layer(randomize):
    class Sometimes(nn.BatchNorm2d):
        def __init__(self, channels):
            super().__init__(channels)
            self.act = nn.Tanh()

        def forward(self, x):
            y = super().forward(x)
            return self.act(y) if len(x) > 1 else y

    net = randomize(behind_a_conv(Sometimes(4)))
    assert rows_of(fold_batch_norm(net, [images(), images()[:1]])) == {"1": ("kept", "subclass")}


class Borrowing(HandWritten):
    """Uses what belongs to another layer."""

    def __init__(self, channels, other):
        super().__init__(channels)
        self.other = [other]

    def forward(self, x):
        return super().forward(x) + 0 * self.other[0].weight[0, 0, 0, 0]


def test_a_forward_that_uses_another_layers_weight_stays(randomize):
    conv = nn.Conv2d(6, 4, 3)
    net = randomize(nn.Sequential(conv, Borrowing(4, conv), nn.Sigmoid()))
    (row,) = fold_batch_norm(net, images()).report.rows
    assert (row.reason, row.detail) == ("subclass", "Borrowing also uses '0.weight'")


class ByTheBatch(nn.BatchNorm2d):
    """Normalizes by the batch whatever its mode."""

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=True)


def test_a_layer_that_never_evaluates_stays(randomize):
    net = randomize(behind_a_conv(ByTheBatch(4)))
    assert rows_of(fold_batch_norm(net, images())) == {"1": ("kept", "training")}


def test_the_root_itself_is_held_by_nobody(randomize):
    """There is no place to put a scale and shift."""
    net = randomize(nn.BatchNorm2d(6))
    assert rows_of(fold_batch_norm(net, images(), standalone="affine"))[""][0] == "kept"
    assert isinstance(net, nn.BatchNorm2d)
