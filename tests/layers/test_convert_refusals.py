"""What is not known is kept, what is wrong is told, and neither leaves a trace."""

import re

import pytest
import torch
from batch_normed import everything, kinds, net
from torch import nn

import bn_lightning as bnl
from bn_lightning.errors import BatchNormError, ConversionError
from bn_lightning.layers import BatchNormVariant, FrozenBatchNorm, GhostBatchNorm
from bn_lightning.layers.registry import VARIANTS

NAMES = sorted(VARIANTS)


class MyBatchNorm(nn.BatchNorm2d):
    pass


class MyVariant(GhostBatchNorm):
    pass


def replaced_forward():
    layer = nn.BatchNorm2d(4)
    layer.forward = lambda x: x
    return layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        pytest.param(lambda: MyBatchNorm(4), r"kept: .*MyBatchNorm is a class of its own", id="subclass"),
        pytest.param(lambda: MyVariant(4), r"kept: .*MyVariant is a class of its own", id="variant of the user"),
        pytest.param(lambda: nn.LazyBatchNorm2d(), "kept: LazyBatchNorm2d has not seen data", id="lazy"),
        pytest.param(replaced_forward, "kept: its forward was replaced on the object", id="replaced forward"),
        pytest.param(
            lambda: torch.jit.script(nn.BatchNorm2d(4)),
            "kept: TorchScript has compiled this BatchNorm2d",
            id="scripted",
        ),
        pytest.param(
            lambda: nn.utils.parametrize.register_parametrization(nn.BatchNorm2d(4), "weight", nn.Identity()),
            "kept: .*ParametrizedBatchNorm2d is a class of its own",
            id="parametrized",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script`", "ignore:Lazy modules")
def test_what_is_not_known_is_kept_and_reported(layer, reason):
    model = nn.Sequential(nn.BatchNorm2d(4), layer())
    kind = type(model[1])
    report = bnl.convert_batch_norm(model, "ghost")
    assert type(model[1]) is kind
    assert type(model[0]) is GhostBatchNorm
    assert re.match(reason, report.rows[1].reason)
    assert not bnl.revert_batch_norm(model).rows[1].changed


def test_a_class_of_the_user_is_a_target():
    model = nn.Sequential(nn.BatchNorm2d(4), MyBatchNorm(4))
    bnl.convert_batch_norm(model, MyVariant, virtual_batch_size=2)
    assert type(model[0]) is MyVariant
    bnl.convert_batch_norm(model, "renorm")
    bnl.revert_batch_norm(model)
    assert kinds(model) == [nn.BatchNorm2d, MyBatchNorm]


@pytest.mark.parametrize(
    ("variant", "options", "match"),
    [
        pytest.param("gost", {}, r"no variant 'gost' \(did you mean 'ghost'\?\); there are .*ghost.*group", id="name"),
        pytest.param(
            "ghost",
            {"virtual_batchsize": 3},
            r"no option 'virtual_batchsize' \(did you mean 'virt",
            id="option",
        ),
        pytest.param(
            "ghost", {"momentum": 0.3}, r"no option 'momentum' \(each layer keeps its own\); it takes v", id="torch's"
        ),
        pytest.param("frozen", {"zzz": 3}, "FrozenBatchNorm has no option 'zzz'; it takes trainable", id="far option"),
        pytest.param("masked", {"zzz": 3}, "MaskedBatchNorm has no option 'zzz'; it takes none", id="no options"),
        pytest.param("group", {"groups": 3}, "group has no option 'groups'.*it takes num_groups", id="of group"),
        pytest.param("ghost", {"virtual_batch_size": 0}, "virtual_batch_size counts", id="value"),
        pytest.param(nn.BatchNorm2d, {}, "back to plain ones with revert_batch_norm", id="plain class"),
        pytest.param(BatchNormVariant, {}, "to a subclass of BatchNormVariant", id="base class"),
        pytest.param("ghost", {"exclude": ["*"]}, "leave no BatchNorm", id="all excluded"),
        pytest.param("ghost", {"include": ["layer4.*"]}, "include pattern 'layer4.*' matches none", id="pattern"),
        pytest.param("ghost", {"include": "bn"}, "bare string", id="string"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True], ids="dry_run={}".format)
def test_mistakes_are_told_and_change_nothing(variant, options, match, dry_run):
    model = net()
    before = everything(model)
    with pytest.raises(BatchNormError, match=match):
        bnl.convert_batch_norm(model, variant, dry_run=dry_run, **options)
    assert everything(model) == before


class Demanding(GhostBatchNorm):
    def configure(self, must):
        self.must = must


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
def test_models_that_cannot_be_converted():
    with pytest.raises(ConversionError, match="Linear has no BatchNorm layer"):
        bnl.convert_batch_norm(net().head, "ghost")
    with pytest.raises(ConversionError, match="TorchScript has compiled every BatchNorm layer"):
        bnl.convert_batch_norm(torch.jit.script(nn.BatchNorm2d(2)), "ghost")
    with pytest.raises(BatchNormError, match=r"expected a torch.nn.Module"):
        bnl.convert_batch_norm("resnet18", "ghost")
    with pytest.raises(ConversionError, match="Demanding needs must"):
        bnl.convert_batch_norm(net(), Demanding)


def test_a_layer_without_statistics_stops_a_variant_that_lives_on_them():
    model = nn.Sequential(net(), nn.BatchNorm1d(6, track_running_stats=False))
    before = everything(model)
    with pytest.raises(ConversionError, match=r"'1' cannot be converted: .*exclude= leaves a layer out"):
        bnl.convert_batch_norm(model, "renorm")
    assert everything(model) == before
    assert bnl.convert_batch_norm(model, "renorm", exclude=["1"]).rows[3].reason == "excluded by pattern"


@pytest.mark.parametrize("crash", [ConversionError, KeyboardInterrupt], ids=lambda kind: kind.__name__)
def test_if_one_layer_fails_all_are_given_back(crash):
    class Picky(FrozenBatchNorm):
        size: int

        def configure(self, size=3):
            self.size = size
            for parameter in self.parameters():
                parameter.requires_grad_(False)
            if self.running_mean is not None:
                self.num_batches_tracked.fill_(99)
                self.register_buffer("extra", torch.zeros(3))
            if self.num_features == 6:
                raise crash("not six channels.")

    model = net()
    before = everything(model)
    with pytest.raises(crash, match="not six" if crash is KeyboardInterrupt else r"'flat' cannot be.*Nothing was conv"):
        bnl.convert_batch_norm(model, Picky)
    assert everything(model) == before
