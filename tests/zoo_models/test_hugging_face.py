"""Networks of transformers: by type, class, folder and name on the hub."""

import json

import pytest
import torch
import transformers

from bn_lightning.errors import BatchNormError
from bn_lightning.zoo import default_input_size, is_zoo_name, load_zoo_model

TINY = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}


def trained():
    torch.manual_seed(0)
    net = transformers.ResNetForImageClassification(transformers.ResNetConfig(**TINY, num_labels=5))
    for _ in range(2):
        net(torch.randn(4, 3, 32, 32))
    return net.eval()


@pytest.fixture
def saved(tmp_path):
    net = trained()
    net.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved", net


def same(net, other):
    return all(torch.equal(value, other.state_dict()[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param("swiftformer", "SwiftFormerForImageClassification", id="type"),
        pytest.param("levit", "LevitForImageClassification", id="type-with-two-classes"),
        pytest.param("SwiftFormerConfig", "SwiftFormerForImageClassification", id="config"),
        pytest.param("SwiftFormerForImageClassification", "SwiftFormerForImageClassification", id="class"),
        pytest.param("MobileViTForSemanticSegmentation", "MobileViTForSemanticSegmentation", id="segmentation"),
    ],
)
def test_a_type_or_class_is_built_without_a_network(name, kind):
    with torch.device("meta"):
        net = load_zoo_model(f"hf:{name}", num_classes=7)
    assert type(net).__name__ == kind
    assert net.config.num_labels == 7
    assert net.training
    assert is_zoo_name(f"hf:{name}")


def test_a_folder_gives_its_configuration_and_its_weights_when_asked(saved):
    folder, net = saved
    built = load_zoo_model(f"hf:{folder}")
    assert type(built) is type(net)
    assert built.config.hidden_sizes == [8, 16]
    assert built.training
    assert not same(built, net)
    loaded = load_zoo_model(f"hf:{folder}", pretrained=True)
    assert same(loaded, net)
    assert loaded.training
    assert all(module.training for module in loaded.modules())
    assert same(load_zoo_model(f"hf:{folder}", checkpoint=folder / "model.safetensors"), net)


def test_another_number_of_classes_draws_the_head_alone(saved):
    folder, net = saved
    loaded = load_zoo_model(f"hf:{folder}", pretrained=True, num_classes=3)
    assert loaded.classifier[1].weight.shape == (3, 16)
    assert same(loaded.resnet, net.resnet)


def test_a_folder_of_a_network_without_a_head(tmp_path):
    net = trained()
    net.resnet.save_pretrained(tmp_path)
    assert same(load_zoo_model(f"hf:{tmp_path}", pretrained=True), net.resnet)
    with_head = load_zoo_model(f"hf:{tmp_path}", pretrained=True, num_classes=3)
    assert same(with_head.resnet, net.resnet)


def test_weights_that_are_not_all_there_are_refused(saved):
    folder, net = saved
    kept = {key: value for key, value in net.state_dict().items() if "stages.1.layers.0.shortcut" not in key}
    torch.save(kept, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BatchNormError, match=r"do not fit ResNet.*its files lack 'resnet.encoder.stages.1.*and 2 more"):
        load_zoo_model(f"hf:{folder}", pretrained=True)
    torch.save({**net.state_dict(), "resnet.more": torch.ones(1)}, folder / "pytorch_model.bin")
    with pytest.raises(BatchNormError, match=r"the network lacks 'resnet.more'"):
        load_zoo_model(f"hf:{folder}", pretrained=True)
    torch.save(
        {key: value for key, value in net.state_dict().items() if "classifier" not in key}, folder / "pytorch_model.bin"
    )
    with pytest.raises(BatchNormError, match=r"its files lack 'classifier.1.bias', 'classifier.1.weight'"):
        load_zoo_model(f"hf:{folder}", pretrained=True)
    # With another number of classes the head may differ, and nothing else.
    resized = net.state_dict() | {"resnet.embedder.embedder.convolution.weight": torch.ones(4, 3, 7, 7)}
    torch.save(resized, folder / "pytorch_model.bin")
    with pytest.raises(BatchNormError, match=r"other shapes have 'resnet.embedder.embedder.convolution.weight'"):
        load_zoo_model(f"hf:{folder}", pretrained=True, num_classes=3)


def test_code_beside_the_weights_is_not_run(saved, monkeypatch):
    folder, _ = saved
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "of_mine", "auto_map": {"AutoConfig": "mine.MyConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    with pytest.raises(BatchNormError, match="could not be read"):
        load_zoo_model(f"hf:{folder}")
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        pytest.param("resnt", {}, r"has no 'resnt' \(did you mean 'resnet'", id="type"),
        pytest.param("/nowhere/at/all", {}, "there is no folder '/nowhere/at/all'", id="folder"),
        pytest.param("{folder}", {}, "a folder without a config.json", id="empty-folder"),
        pytest.param("resnet", {"pretrained": True}, "names an architecture, which has no weights", id="pretrained"),
        pytest.param("ResNetModel", {"num_classes": 3}, "is a ResNetModel, which has no classes", id="no-classes"),
        pytest.param("bert", {}, "has no 'bert'.*a model type for images", id="no-vision"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, name, options, says):
    with pytest.raises(BatchNormError, match=says):
        load_zoo_model(f"hf:{name.format(folder=tmp_path)}", **options)


def test_a_name_on_the_hub_without_a_network_is_told_so(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BatchNormError, match=r"nobody/nothing.*needs a network, or the files in its cache"):
        load_zoo_model("hf:nobody/nothing")


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param("mobilevit", (3, 256, 256), id="number"),
        pytest.param("textnet", (3, 640, 640), id="pair"),
        pytest.param("regnet", (3, 224, 224), id="none"),
        pytest.param("BertModel", None, id="text"),
    ],
)
def test_the_input_size_is_the_configurations(name, size):
    with torch.device("meta"):
        assert default_input_size(load_zoo_model(f"hf:{name}")) == size
