"""The classifier against torch by hand; its checkpoints; its way out."""

import math
import warnings
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import onnxruntime
import pytest
import torch
from batch_normed import kinds, randomized
from modules.loading import SAFELY
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from torchvision.models import googlenet

from bn_lightning.errors import BatchNormError, ConversionError, FoldError
from bn_lightning.layers import FrozenBatchNorm, GhostBatchNorm, convert_batch_norm
from bn_lightning.modules import DigitsDataModule, ImageClassifier
from bn_lightning.networks import ResidualNetwork

SMALL = {"widths": (4, 8), "blocks": 1}


def trainer(tmp_path, **options):
    return pl.Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def step(module, *batch):
    """A training step without a Trainer, where ``self.log`` does nothing but warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*self.log")
        return module.training_step(batch, 0)


def test_it_learns_and_its_accuracy_is_the_share_classified_right(tmp_path):
    pl.seed_everything(0, verbose=False)
    module, data = ImageClassifier(network_options=SMALL), DigitsDataModule()
    fit = trainer(tmp_path, max_epochs=8, enable_checkpointing=False)
    fit.fit(module, data)
    logged = fit.test(module, data, verbose=False)[0]
    module.eval()
    with torch.no_grad():
        images, labels = data.test_data.tensors
        logits = module(images)
    assert logged["test/accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item(), abs=1e-6)
    assert logged["test/loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)
    assert logged["test/accuracy"] > 0.8
    classes = torch.cat(fit.predict(module, data))
    assert torch.equal(classes, logits.argmax(1))


def test_a_checkpoint_rebuilds_a_named_network_under_weights_only(tmp_path):
    module, data = ImageClassifier("residual", learning_rate=0.05, network_options=SMALL), DigitsDataModule()
    fit = trainer(tmp_path, max_steps=2)
    fit.fit(module, data)
    path = tmp_path / "trained.ckpt"
    fit.save_checkpoint(path)
    loaded = ImageClassifier.load_from_checkpoint(path, **SAFELY)
    assert loaded.hparams["learning_rate"] == 0.05
    for name, value in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_a_network_object_is_not_saved_and_the_error_says_what_to_do(tmp_path):
    network = ResidualNetwork(**SMALL)
    module = ImageClassifier(network)
    fit = trainer(tmp_path, max_steps=1)
    fit.fit(module, DigitsDataModule())
    path = tmp_path / "trained.ckpt"
    fit.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)["hyper_parameters"]
    assert saved["model"] is None
    with pytest.raises(BatchNormError, match=r"load_from_checkpoint\(path, model=network\)"):
        ImageClassifier.load_from_checkpoint(path, **SAFELY)
    again = ImageClassifier.load_from_checkpoint(path, model=ResidualNetwork(**SMALL), **SAFELY)
    assert torch.equal(again.model.head.weight, network.head.weight)


def test_options_for_an_object_are_refused():
    with pytest.raises(BatchNormError, match=r"network_options= are for .*, given by name; got a Linear"):
        ImageClassifier(nn.Linear(2, 2), network_options={"widths": (4,)})


def test_the_learning_rate_makes_one_cycle(tmp_path):
    module = ImageClassifier(network_options=SMALL, learning_rate=0.2)
    rates, momenta = [], set()

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])
            momenta.add(trainer.optimizers[0].param_groups[0]["momentum"])

    trainer(tmp_path, max_epochs=1, callbacks=[Watch()], enable_checkpointing=False).fit(module, DigitsDataModule())
    assert len(rates) == math.ceil(1257 / 64)
    assert max(rates) == pytest.approx(0.2, rel=0.05)
    assert rates[-1] < rates[0] < 0.05
    assert momenta == {0.9}


class Answers(nn.Module):
    """Gives the logits that are asked for: an "image" is them."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return self.scale * images


def test_loss_accuracy_and_top_5_of_unequal_batches_with_images_to_ignore(tmp_path):
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 8, (23,), generator=generator)
    logits = torch.randn(23, 8, generator=generator)
    logits[:10, labels[:10]] += 9.0  # the first batch is all right, at the top and among five
    logits[torch.arange(10), labels[:10]] += 99.0
    labels[[0, 12, 20, 21, 22]] = -1  # of the last batch none is left
    module = ImageClassifier(Answers(), num_classes=8, ignore_index=-1)
    loader = DataLoader(TensorDataset(logits, labels), batch_size=10)
    logged = trainer(tmp_path).test(module, loader, verbose=False)[0]
    z, y = (tensor[labels != -1].double().numpy() for tensor in (logits, labels))
    y = y.astype(int)
    chosen = z[np.arange(len(y)), y]
    assert logged["test/loss"] == pytest.approx((np.log(np.exp(z).sum(1)) - chosen).mean(), rel=1e-5)
    rank = (z > chosen[:, None]).sum(1)
    assert logged["test/accuracy"] == pytest.approx((rank == 0).mean(), abs=1e-6)
    assert logged["test/accuracy_top5"] == pytest.approx((rank < 5).mean(), abs=1e-6)
    assert (rank == 0).mean() < (rank < 5).mean() < 1, "the two are told apart"


def test_metrics_that_agree_on_the_first_batch_stay_apart(tmp_path):
    class Two(ImageClassifier):
        def metrics(self, num_classes, ignore_index):
            return {f"top{k}": MulticlassAccuracy(num_classes, top_k=k, average="micro") for k in (2, 3)}

    labels = torch.arange(8) % 4
    logits = nn.functional.one_hot(labels, 4) * 9.0 + torch.arange(4) * 0.1
    logits[4:] = torch.tensor([3.0, 2.0, 1.0, 0.0])  # of the second batch two and three of four are among so many
    loader = DataLoader(TensorDataset(logits, labels), batch_size=4)
    logged = trainer(tmp_path).test(Two(Answers(), num_classes=4), loader, verbose=False)[0]
    assert (logged["test/top2"], logged["test/top3"]) == (pytest.approx(6 / 8), pytest.approx(7 / 8))


def test_of_five_classes_there_is_no_top_5():
    assert list(ImageClassifier(Answers(), num_classes=5).val_metrics) == ["val/accuracy"]


def test_a_batch_with_nothing_to_learn_from_is_no_nan():
    module = ImageClassifier(Answers(), num_classes=3)
    images = torch.randn(2, 3)
    loss = step(module, images, torch.tensor([-100, -100]))
    loss.backward()
    assert loss == 0
    assert module.model.scale.grad == 0


def test_the_loss_of_float16_does_not_overflow():
    logits = torch.full((4, 3), -2e4, dtype=torch.float16)
    logits[:, 0] = 2e4
    loss = ImageClassifier(Answers(), num_classes=3).loss(logits, torch.tensor([1, 1, 1, 1]))
    assert loss == pytest.approx(4e4, rel=1e-3)


def test_auxiliary_logits_add_with_their_weights():
    torch.manual_seed(0)
    network = googlenet(weights=None, num_classes=6, init_weights=False, dropout=0.0, dropout_aux=0.0)
    module = ImageClassifier(network, num_classes=6)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 5, 2, 1])
    output = network(images)
    of = {name: nn.functional.cross_entropy(value, labels) for name, value in output._asdict().items()}
    expected = of["logits"] + 0.3 * (of["aux_logits1"] + of["aux_logits2"])
    torch.testing.assert_close(step(module, images, labels), expected)
    assert torch.equal(module(images), output.logits)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param("timm:test_resnet", id="timm"),
        pytest.param("torchvision:shufflenet_v2_x0_5", id="torchvision"),
        pytest.param("bn_lightning.networks:ResidualNetwork", id="callable"),
        pytest.param({"class_path": "torch.nn.Sequential"}, id="class path"),
    ],
)
def test_a_checkpoint_of_a_name_rebuilds_bit_for_bit(tmp_path, model):
    if isinstance(model, dict):
        model = {"class_path": "bn_lightning.networks.ResidualNetwork", "init_args": {"widths": (4,), "blocks": 1}}
    channels = 3 if "timm" in str(model) or "torchvision" in str(model) else 1
    module = ImageClassifier(model, norm="ghost", norm_options={"virtual_batch_size": 4}, optimizer="adamw")
    loader = DataLoader(TensorDataset(torch.randn(8, channels, 32, 32), torch.arange(8)), batch_size=4)
    fit = trainer(tmp_path, max_steps=2)
    fit.fit(module, loader, loader)
    fit.save_checkpoint(tmp_path / "trained.ckpt")
    torch.manual_seed(99)
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "trained.ckpt", **SAFELY)
    assert loaded.hparams == module.hparams
    assert set(kinds(loaded.model)) == {GhostBatchNorm}
    assert loaded.state_dict().keys() == module.state_dict().keys()
    for name, value in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    images = torch.randn(2, channels, 32, 32)
    assert torch.equal(loaded.eval()(images), module.eval()(images))


@pytest.mark.parametrize(
    ("model", "kept"),
    [("timm:test_resnet", False), ("torchvision:googlenet", True)],
    ids=["same either way", "googlenet"],
)
def test_a_checkpoint_does_not_fetch_weights_again(tmp_path, monkeypatch, model, kept):
    network = googlenet(weights=None, init_weights=False) if kept else ResidualNetwork(**SMALL)
    monkeypatch.setattr("bn_lightning.modules.network_module.open_source", lambda *_, **options: network)
    module = ImageClassifier(model, pretrained=True, checkpoint="weights.pt")
    assert module.hparams["pretrained"], "loggers are told what was done"
    fit = trainer(tmp_path)
    fit.strategy.connect(module)
    fit.save_checkpoint(tmp_path / "trained.ckpt")
    saved = torch.load(tmp_path / "trained.ckpt", weights_only=True)["hyper_parameters"]
    # With its weights torchvision's googlenet has no auxiliary parts and transforms its inputs.
    assert (saved["pretrained"], saved["checkpoint"]) == (kept, None)


def test_training_goes_on_from_a_checkpoint(tmp_path):
    digits = DigitsDataModule()
    digits.setup("fit")
    data = DataLoader(digits.train_data, batch_size=256)

    def fitted(module, epochs, path=None):
        fit = trainer(tmp_path, max_epochs=epochs, enable_checkpointing=False)
        fit.fit(module, data, data, ckpt_path=path)
        return fit

    def fresh(seed):
        torch.manual_seed(seed)
        return ImageClassifier("residual", network_options=SMALL, optimizer="adamw", schedule="step")

    straight, resumed = fresh(0), fresh(1)
    fitted(straight, 2)
    fitted(fresh(0), 1).save_checkpoint(tmp_path / "one.ckpt")
    fitted(resumed, 2, tmp_path / "one.ckpt")
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_the_norm_is_converted_on_the_way_in():
    network = ResidualNetwork(**SMALL)
    module = ImageClassifier(network, norm="frozen", norm_options={"include": ["stem.*"]})
    assert module.model is network
    assert kinds(network)[0] is FrozenBatchNorm
    assert set(kinds(network)[1:]) == {nn.BatchNorm2d}


def test_group_norm_loads_into_an_object_that_is_converted_already_or_not(tmp_path):
    module = ImageClassifier(randomized(ResidualNetwork(**SMALL)), norm="group", norm_options={"num_groups": 2})
    fit = trainer(tmp_path)
    fit.strategy.connect(module)
    fit.save_checkpoint(tmp_path / "group.ckpt")
    converted = ResidualNetwork(**SMALL)
    convert_batch_norm(converted, "group", num_groups=2)
    images = torch.randn(2, 1, 8, 8)
    for given in (converted, ResidualNetwork(**SMALL)):
        loaded = ImageClassifier.load_from_checkpoint(tmp_path / "group.ckpt", model=given)
        assert torch.equal(loaded(images), module(images))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param({"norm": "gost"}, ConversionError, "did you mean 'ghost'", id="norm"),
        pytest.param({"norm_options": {"momentum": 0.2}}, BatchNormError, "norm_options=.* for a norm=", id="no norm"),
        pytest.param({"optimizer": "sdg"}, BatchNormError, "did you mean 'sgd'", id="optimizer"),
        pytest.param({"optimizer_options": {"beta": 1}}, BatchNormError, "unexpected keyword argument", id="option"),
        pytest.param({"schedule": "cosin"}, BatchNormError, "did you mean 'cosine'", id="schedule"),
        pytest.param({"schedule_options": {"gamma": 1}}, BatchNormError, "OneCycleLR cannot be made", id="its option"),
        pytest.param(
            {"optimizer_options": {"betas": torch.ones(2)}}, BatchNormError, "is a Tensor; expected names", id="values"
        ),
    ],
)
def test_what_is_wrong_is_told_when_it_is_made(arguments, error, message):
    with pytest.raises(error, match=message):
        ImageClassifier("residual", network_options=SMALL, **arguments)


def test_logits_that_do_not_fit_the_labels_are_named():
    module = ImageClassifier(ResidualNetwork(num_classes=7), num_classes=10)
    with pytest.raises(BatchNormError, match=r"ResidualNetwork gave logits of shape \[2, 7\] for labels of \[2\]; exp"):
        step(module, torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]))


def test_it_folds_a_copy_and_ships_it(tmp_path):
    module = ImageClassifier(randomized(ResidualNetwork(**SMALL)), norm="ghost")
    module.model.stem[0].weight.requires_grad_(False)
    images = torch.randn(3, 1, 8, 8)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    result = module.folded(images)
    assert type(result.model) is ResidualNetwork
    assert result.model is not module.model
    assert result.report.error < 1e-9
    assert not kinds(result.model)
    assert module.model.training
    assert set(kinds(module.model)) == {GhostBatchNorm}
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    expected = module.eval()(images)
    torch.testing.assert_close(result.model(images), expected, rtol=1e-4, atol=1e-4)
    shipped = module.ship(tmp_path / "net.pt2", images)
    torch.testing.assert_close(torch.export.load(shipped.path).module()(images), expected, rtol=1e-4, atol=1e-4)
    shipped = module.ship(tmp_path / "net.onnx", images)
    session = onnxruntime.InferenceSession(shipped.path)
    found = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-4, atol=1e-4)


def test_folding_takes_options_and_names_what_is_missing(tmp_path):
    module = ImageClassifier("residual", network_options=SMALL)
    images = torch.randn(2, 1, 8, 8)
    assert len(kinds(module.folded(images, exclude=["stem.*"]).model)) == 1
    with pytest.raises(BatchNormError, match="ResidualNetwork does not say the size of its inputs"):
        module.folded()
    with pytest.raises(FoldError):
        ImageClassifier(Answers()).folded(torch.zeros(2, 10))
    with pytest.raises(BatchNormError, match="names no format"):
        module.ship(tmp_path / "net.tflite", images)


def test_a_zoo_network_knows_an_example_of_its_inputs():
    module = ImageClassifier("timm:test_resnet", num_classes=4)
    assert module.example_input_array.shape == (2, *module.model.default_cfg["input_size"])
    assert module(module.example_input_array).shape == (2, 4)
    assert module.folded().report.error < 1e-9
    assert ImageClassifier(module.model, num_classes=4).example_input_array is None


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true"])
def test_the_example_has_the_precision_of_the_training(tmp_path, precision, capsys, caplog):
    caplog.set_level("INFO")  # where Lightning 2.5 writes the summary
    module = ImageClassifier("timm:test_resnet", num_classes=4)
    loader = DataLoader(TensorDataset(torch.randn(4, 3, 32, 32), torch.arange(4)), batch_size=4)
    fit = pl.Trainer(
        max_steps=1,
        precision=precision,
        accelerator="cpu",
        logger=False,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    fit.fit(module, loader, loader)  # its summary runs the example
    assert "In sizes" in capsys.readouterr().out + caplog.text
    assert module.example_input_array.dtype == next(module.model.parameters()).dtype
    module.example_input_array = (torch.zeros(1, 3, 8, 8), 3)
    assert module.example_input_array[1] == 3


class Records(nn.Module):
    """Answers with a record of a class of its own, as transformers' networks do."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return SimpleNamespace(loss=None, logits=self.network(images))


def test_a_program_gives_the_logits_and_not_the_record_around_them(tmp_path):
    module = ImageClassifier(Records(randomized(ResidualNetwork(**SMALL))))
    images = torch.randn(2, 1, 8, 8)
    program = torch.export.load(module.ship(tmp_path / "net.pt2", images).path).module()
    torch.testing.assert_close(program(images), module.eval()(images), rtol=1e-4, atol=1e-4)
    whole = torch.load(module.ship(tmp_path / "net.pt", images).path, weights_only=False)
    assert type(whole) is Records


def test_a_compiled_network_in_channels_last_is_left_as_it_is(tmp_path):
    # Not SMALL: a 1×1 convolution of stride 2 with fewer channels than a vector writes past its memory in the backward
    # pass of torch 2.13's CPU build, and may end the process (oneDNN issue 6035).
    network = ResidualNetwork(widths=(16, 16), blocks=1).to(memory_format=torch.channels_last)
    compiled = torch.compile(network, backend="eager")
    module = ImageClassifier(compiled, norm="ghost")
    assert module.model is compiled
    trainer(tmp_path, max_steps=2, enable_checkpointing=False).fit(module, DigitsDataModule())
    assert network.stages[1][0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    images = torch.randn(2, 1, 8, 8)
    result = module.folded(images)
    assert type(result.model) is ResidualNetwork
    torch.testing.assert_close(result.model(images), module.eval()(images), rtol=1e-4, atol=1e-4)
