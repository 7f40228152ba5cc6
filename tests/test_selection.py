import pytest
import torch
from torch import nn

from bn_lightning.errors import BatchNormError, FoldError
from bn_lightning.selection import failing_layer, named_batch_norms, require_batch_norms, select_modules, unwrap


@pytest.fixture
def net():
    shared = nn.BatchNorm1d(2)
    return nn.ModuleDict(
        {
            "stem": nn.Sequential(nn.Linear(2, 2), shared),
            "head": nn.Sequential(shared, nn.SyncBatchNorm(2), nn.InstanceNorm1d(2)),
        }
    )


def test_batch_norms_once_each_and_no_instance_norm(net):
    assert list(named_batch_norms(net)) == ["stem.1", "head.1"]


@pytest.mark.parametrize(
    ("include", "exclude", "names"),
    [
        pytest.param(("stem.*",), (), ["stem.0", "stem.1"], id="include"),
        pytest.param(("*.1",), ("stem*",), ["head.1"], id="both"),
        pytest.param((), ("*.*",), ["", "stem", "head"], id="exclude"),
    ],
)
def test_patterns(net, include, exclude, names):
    assert list(select_modules(net, include, exclude)) == names


def test_a_pattern_that_matches_nothing_is_an_error(net):
    with pytest.raises(BatchNormError, match=r"include pattern 'layer4\.\*' matches none .*'stem\.1'"):
        named_batch_norms(net, include=("layer4.*",))
    with pytest.raises(BatchNormError, match="exclude pattern"):
        named_batch_norms(net, exclude=("nothing",))


def test_a_bare_string_is_an_error(net):
    with pytest.raises(BatchNormError, match=r"write \['stem\*'\]"):
        named_batch_norms(net, include="stem*")


def test_no_batch_norm_names_the_model_and_the_cure():
    with pytest.raises(FoldError, match=r"Sequential has no BatchNorm layer .* Pass the network"):
        require_batch_norms(nn.Sequential(nn.Linear(2, 2)), error=FoldError)


def test_nothing_left_is_an_error(net):
    with pytest.raises(BatchNormError, match="leave no BatchNorm"):
        require_batch_norms(net, exclude=("*",))


def test_wrappers_are_looked_through(net):
    layer = nn.BatchNorm1d(2)
    assert unwrap(torch.compile(nn.DataParallel(layer), backend="eager")) is layer
    assert unwrap(layer) is layer


def test_the_layer_an_exception_came_through_is_named():
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))
    with pytest.raises(RuntimeError) as raised:
        model(torch.zeros(1, 2))
    assert failing_layer(model, raised.value) == "1.1"
    assert failing_layer(nn.Linear(2, 2), raised.value) is None


def test_something_that_is_no_module_is_refused():
    with pytest.raises(BatchNormError, match=r"expected a torch\.nn\.Module as the model, got a str"):
        unwrap("resnet18")
