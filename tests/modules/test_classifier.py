import math

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from bn_lightning.errors import BatchNormError
from bn_lightning.modules import DigitsDataModule, ImageClassifier, decay_groups
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
    loaded = ImageClassifier.load_from_checkpoint(path, weights_only=True)
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
        ImageClassifier.load_from_checkpoint(path, weights_only=True)
    again = ImageClassifier.load_from_checkpoint(path, model=ResidualNetwork(**SMALL), weights_only=True)
    assert torch.equal(again.model.head.weight, network.head.weight)


def test_options_for_an_object_are_refused():
    with pytest.raises(BatchNormError, match="network_options= are for a network given by name"):
        ImageClassifier(nn.Linear(2, 2), network_options={"widths": (4,)})


def test_norm_parameters_and_biases_do_not_decay():
    network = ResidualNetwork(**SMALL)
    decayed, kept = decay_groups(network, 0.3)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    assert decayed["weight_decay"] == 0.3
    assert kept["weight_decay"] == 0.0
    weights = {id(m.weight) for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert {id(parameter) for parameter in decayed["params"]} == weights
    assert {id(parameter) for parameter in kept["params"]} == set(names) - weights
    network.head.weight.requires_grad_(False)
    assert len(decay_groups(network, 0.3)[0]["params"]) == len(weights) - 1


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
