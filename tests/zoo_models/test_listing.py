"""What the zoos have: names at once, numbers of BatchNorm layers without data, folds when asked."""

import json
import sys

import pytest
import timm
import torch
import torchvision
from torch import nn

from bn_lightning.errors import BatchNormError
from bn_lightning.zoo import build, describe_zoo_model, list_zoo_models


def names(*patterns):
    return [row.name for row in list_zoo_models(patterns).rows]


def test_names_are_all_there_and_nothing_is_built(monkeypatch):
    monkeypatch.setattr(nn.Module, "__init__", lambda *_, **__: pytest.fail("a network"))
    listing = list_zoo_models()
    assert listing.missing == ()
    found = [row.name for row in listing.rows]
    assert len(found) == len(set(found))
    timms, torchvisions = timm.list_models(), torchvision.models.list_models()
    assert found[: len(timms)] == [f"timm:{name}" for name in timms]
    assert found[len(timms) : len(timms) + len(torchvisions)] == [f"torchvision:{name}" for name in torchvisions]
    assert {"hf:resnet", "hf:mobilenet_v2", "hf:upernet"} <= set(found[len(timms) + len(torchvisions) :])
    assert all(row.batch_norms is None and row.parameters is None for row in listing.rows)


def test_patterns_pick_with_and_without_the_zoo():
    assert names("timm:test_resnet") == ["timm:test_resnet"]
    assert names("resnet18") == ["timm:resnet18", "torchvision:resnet18"]
    assert names("hf:mobilenet*") == ["hf:mobilenet_v1", "hf:mobilenet_v2"]
    assert names("t*:resnet34", "hf:vit") == ["timm:resnet34", "torchvision:resnet34", "hf:vit"]


def test_a_zoo_that_is_not_installed_is_told_and_the_others_are_listed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    listing = list_zoo_models("resnet18")
    assert [row.name for row in listing.rows] == ["torchvision:resnet18"]
    assert "needs the package timm" in listing.missing[0]
    assert "needs the package timm" in str(listing)
    assert list_zoo_models("hf:resnet").missing == ()
    with pytest.raises(BatchNormError, match=r"'timm:resnet18' matches no network .*needs the package timm"):
        list_zoo_models("timm:resnet18")


def test_what_is_wrong_is_said():
    with pytest.raises(BatchNormError, match="'timm:resnt' matches no network"):
        list_zoo_models(["timm:resnet18", "timm:resnt"])
    with pytest.raises(BatchNormError, match="detail= is one of 'names', 'layers', 'folds'; got 'all'"):
        list_zoo_models(detail="all")


@pytest.mark.parametrize(
    ("name", "norms", "parameters"),
    [
        # As their papers and documentation have them.
        pytest.param("timm:resnet50", 53, 25_557_032, id="timm"),
        pytest.param("torchvision:densenet121", 121, 7_978_856, id="torchvision"),
        pytest.param("torchvision:regnet_y_400mf", 53, 4_344_144, id="not-on-the-meta-device"),
        pytest.param("hf:resnet", 53, 25_557_032 - 2_049_000 + 4_098, id="hf-two-classes"),
        pytest.param("timm:vit_tiny_patch16_224", 0, 5_717_416, id="none"),
    ],
)
def test_layers_are_counted_without_data(name, norms, parameters):
    before = torch.random.get_rng_state()
    row = describe_zoo_model(name, folds=False)
    assert (row.batch_norms, row.parameters, row.folded, row.problem) == (norms, parameters, None, "")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_folds_are_those_of_the_plan():
    before = torch.random.get_rng_state()
    row = describe_zoo_model("timm:repvgg_a0")
    # Of its 61 the 17 in identity branches are read beside the convolutions (tests/folding/test_zoo.py).
    assert (row.batch_norms, row.folded, row.kept) == (61, 44, {"nonlinear_between": 17})
    assert describe_zoo_model("timm:test_vit").folded is None
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_cannot_be_built_or_run_says_so_in_its_row(monkeypatch):
    class Breaks(nn.Sequential):
        def forward(self, x):
            raise RuntimeError("no image of mine")

    def built(name, pretrained, options):
        if name.endswith("test_vit"):
            raise BatchNormError("it is too large")
        return Breaks(nn.BatchNorm2d(3))

    monkeypatch.setitem(build._ZOOS, "timm", built)
    listing = list_zoo_models(["timm:test_vit", "timm:test_resnet"], detail="folds")
    resnet, vit = listing.rows
    assert vit.problem == "it is too large"
    assert vit.batch_norms is None
    assert resnet.batch_norms == 1
    assert resnet.problem == "it does not say what inputs it takes"
    monkeypatch.setattr(Breaks, "default_cfg", {"input_size": (3, 8, 8)}, raising=False)
    assert "no image of mine" in describe_zoo_model("timm:test_resnet").problem
    assert "it is too large" in str(listing)


def test_the_listing_shows_itself_and_goes_into_json():
    listing = list_zoo_models(["timm:test_resnet", "timm:test_vit"], detail="folds")
    assert str(listing).splitlines()[0] == "2 networks, 1 with BatchNorm"
    assert str(listing).splitlines()[3].split() == ["timm:test_resnet", "0.47", "15", "15", "–"]
    row = json.loads(json.dumps(listing.to_dict()))["rows"][0]
    assert list(row) == ["name", "parameters", "batch_norms", "folded", "kept", "problem"]
    assert (row["name"], row["folded"], row["kept"]) == ("timm:test_resnet", 15, {})
    assert "<td>timm:test_vit</td>" in listing._repr_html_()
