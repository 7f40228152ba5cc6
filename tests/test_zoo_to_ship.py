"""A network of each source, from its name to a file: built, converted, trained, audited, folded, exported."""

import subprocess
import sys
import textwrap

import lightning.pytorch as pl
import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from batch_normed import kinds
from torch.utils.data import DataLoader, TensorDataset

from bn_lightning import audit_batch_norm
from bn_lightning.callbacks import BatchNormAudit
from bn_lightning.layers import GhostBatchNorm
from bn_lightning.modules import ImageClassifier
from bn_lightning.modules.outputs import logits_of

CLASSES = 7
SOURCES = {
    "timm": "timm:test_resnet",
    "torchvision": "torchvision:shufflenet_v2_x0_5",
    "hf": "hf:{folder}",
    "callable": "bn_lightning.networks:ResidualNetwork",
}
# transformers' own defaults are of networks of many millions of parameters.
TINY = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}


def tiny(folder):
    transformers.ResNetConfig(**TINY).save_pretrained(folder / "tiny")
    return folder / "tiny"


@pytest.mark.parametrize("source", SOURCES)
def test_from_a_name_to_a_file(source, tmp_path):
    torch.manual_seed(0)
    channels = 1 if source == "callable" else 3
    images, labels = torch.randn(16, channels, 32, 32), torch.randint(0, CLASSES, (16,))
    loader = DataLoader(TensorDataset(images, labels), batch_size=8)

    name = SOURCES[source].format(folder=tiny(tmp_path))
    module = ImageClassifier(name, CLASSES, norm="ghost", norm_options={"virtual_batch_size": 4}, optimizer="adamw")
    layers = len(kinds(module.model))
    assert set(kinds(module.model)) == {GhostBatchNorm}
    before = {name: value.clone() for name, value in module.model.state_dict().items()}

    audit = BatchNormAudit()
    trainer = pl.Trainer(
        max_steps=2,
        callbacks=[audit],
        accelerator="cpu",
        logger=False,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader, loader)
    assert trainer.global_step == 2
    # Every tensor has moved: weights, scales, shifts, statistics and counts.
    still = [name for name, value in module.model.state_dict().items() if torch.equal(value, before[name])]
    assert still == []

    assert len(audit.report.layers) == layers
    assert audit.report.losses.full_training.mean > 0
    alone = audit_batch_norm(module, loader, loss=torch.nn.functional.cross_entropy)
    assert len(alone.layers) == layers

    result = module.folded(images)
    assert result.report.error < 1e-9
    assert kinds(result.model) == []
    assert len(kinds(module.model)) == layers

    expected = module.eval()(images).detach()
    torch.testing.assert_close(logits_of(result.model(images)), expected, rtol=1e-4, atol=1e-4)
    path = module.ship(tmp_path / "network.pt2", images).path
    torch.testing.assert_close(torch.export.load(path).module()(images[:3]), expected[:3], rtol=1e-4, atol=1e-4)
    session = onnxruntime.InferenceSession(module.ship(tmp_path / "network.onnx", images).path)
    found = session.run(None, {session.get_inputs()[0].name: images[:5].numpy()})[0]
    np.testing.assert_allclose(found, expected[:5].numpy(), rtol=1e-4, atol=1e-4)


def test_a_program_of_a_transformers_network_loads_where_transformers_is_not(tmp_path):
    module = ImageClassifier(f"hf:{tiny(tmp_path)}", CLASSES).eval()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    module.ship(tmp_path / "network.pt2", images)
    torch.save({"images": images, "logits": module(images).detach()}, tmp_path / "expected.pt")
    code = """
        import sys
        sys.modules["transformers"] = None  # an import of it fails
        import torch
        program = torch.export.load("network.pt2").module()
        expected = torch.load("expected.pt")
        torch.testing.assert_close(program(expected["images"]), expected["logits"], rtol=1e-4, atol=1e-5)
        print("the same logits")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.stdout.strip() == "the same logits", done.stderr
