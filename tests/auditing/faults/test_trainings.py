"""What only a watched training shows is found at its layers, and healthy trainings of many kinds have no finding."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from auditing.faults.catalogue_trainings import FAULTS, LikeEvaluation, Recomputing, TwoViews
from auditing.faults.trainings import Digits, audited
from lightning.pytorch.callbacks import WeightAveraging
from torch.utils.checkpoint import checkpoint

import bn_lightning as bnl
from bn_lightning.callbacks import FreezeBatchNorm, RecalibrateBatchNorm

BOTH = ("net.0.1", "net.0.4")


def of_rule(report, slug):
    return {finding.layer: finding for finding in report.findings if finding.rule == slug}


@pytest.mark.parametrize("stages", [None, ["static", "passive"]], ids=["all", "without-data"])
@pytest.mark.parametrize(
    ("slug", "layers", "evidence"),
    [
        ("extra-forward", BOTH, {"updates": 2.0}),
        ("checkpoint-recompute", BOTH[1:], {"backward_updates": 1.0}),
        ("wrong-mode", BOTH[1:], {"validation_updates": 40}),
        ("frozen-weights-moving-statistics", BOTH, {"forward_updates": 1.0}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_training_with_the_fault_is_found(slug, layers, evidence, stages, monkeypatch):
    if stages is not None:
        monkeypatch.setattr(
            "auditing.faults.catalogue_trainings.audited", lambda module: audited(module, stages=stages)
        )
    found = of_rule(FAULTS[slug](), slug)
    assert sorted(found) == sorted(layers)
    assert {finding.severity for finding in found.values()} == {"error" if slug == "wrong-mode" else "warning"}
    for finding in found.values():
        assert evidence.items() <= finding.evidence.items()


def test_a_training_that_goes_on_in_evaluation_mode():
    found = of_rule(audited(Digits(), LikeEvaluation()), "wrong-mode")
    assert sorted(found) == sorted(BOTH)
    assert {finding.evidence["training_share"] for finding in found.values()} == {0.11}


class PausedTwoViews(TwoViews):
    def training_step(self, batch, batch_idx):
        x, y = batch
        with torch.no_grad(), bnl.paused_statistics(self):
            target = self(x + 0.3 * torch.randn_like(x)).softmax(1)
        logits = self(x)
        return F.cross_entropy(logits, y) + 0.1 * F.cross_entropy(logits, target)


class EvaluatedView(TwoViews):
    def training_step(self, batch, batch_idx):
        x, y = batch
        self.eval()
        with torch.no_grad():
            target = self(x + 0.3 * torch.randn_like(x)).softmax(1)
        self.train()
        logits = self(x)
        return F.cross_entropy(logits, y) + 0.1 * F.cross_entropy(logits, target)


class PausedRecomputing(Recomputing):
    def forward(self, x):
        features = self.net[0]
        again = lambda: (nullcontext(), bnl.paused_statistics(features))  # noqa: E731
        x = checkpoint(features[3:], features[:3](x), use_reentrant=False, context_fn=again)
        return self.net[1:](x)


class Frozen(Digits):
    def configure_optimizers(self):
        self.net[0].requires_grad_(False)
        self.net[0].eval()
        return torch.optim.SGD(self.net[1:].parameters(), lr=0.05)


class Closure(Digits):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=2)


class Skipping(Digits):
    def training_step(self, batch, batch_idx):
        return None if batch_idx == 3 else super().training_step(batch, batch_idx)


class StopsEarly(Digits):
    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 15 else None


class ByHand(Digits):
    """Two optimizers and two backward passes through one forward pass."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        x, y = batch
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        logits = self(x)
        self.manual_backward(F.cross_entropy(logits, y), retain_graph=True)
        self.manual_backward(0.1 * logits.square().mean())
        for optimizer in optimizers:
            optimizer.step()
        if self.trainer.is_last_batch:
            for schedule in self.lr_schedulers():
                schedule.step()

    def configure_optimizers(self):
        optimizers = [torch.optim.SGD(part.parameters(), lr=0.05, momentum=0.9) for part in (self.net[0], self.net[3])]
        return optimizers, [torch.optim.lr_scheduler.CosineAnnealingLR(each, 5) for each in optimizers]


@pytest.mark.parametrize(
    ("make", "callbacks", "options"),
    [
        pytest.param(Digits, (), {}, id="plain"),
        pytest.param(Digits, (), {"accumulate_grad_batches": 4, "val_check_interval": 7}, id="accumulation"),
        pytest.param(PausedTwoViews, (), {}, id="extra-pass-paused"),
        pytest.param(EvaluatedView, (), {}, id="extra-pass-in-evaluation-mode"),
        pytest.param(PausedRecomputing, (), {}, id="recompute-paused"),
        pytest.param(Closure, (), {}, id="closure"),
        pytest.param(Skipping, (), {}, id="skipped-batches"),
        pytest.param(StopsEarly, (), {}, id="epochs-cut-short"),
        pytest.param(ByHand, (), {}, id="manual-optimization"),
        pytest.param(Digits, (RecalibrateBatchNorm,), {"val_check_interval": 7}, id="recalibrated"),
        pytest.param(Digits, (lambda: FreezeBatchNorm(from_epoch=3),), {"max_epochs": 4}, id="frozen-later"),
        pytest.param(
            Digits, (WeightAveraging, lambda: RecalibrateBatchNorm(when="end")), {"max_epochs": 5}, id="averaged"
        ),
    ],
)
def test_a_healthy_training_has_no_finding_above_info(make, callbacks, options):
    report = audited(make(), *(build() for build in callbacks), **options)
    assert report.exit_code("warning") == 0, str(report)
    frozen = any("is frozen" in row.reason for row in report.not_looked)
    assert (report.layers[0].gap is None) == frozen
    assert frozen == (options == {"max_epochs": 4})
