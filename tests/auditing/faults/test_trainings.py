"""What only a watched training shows is found at its layers, and healthy trainings of many kinds have no finding."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from auditing.faults.catalogue_trainings import FAULTS, LikeEvaluation, Recomputing, TwoViews
from auditing.faults.digits_training import digits
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
    told_by_a_loss = slug == "extra-forward" and stages is not None
    severity = "error" if slug == "wrong-mode" else "info" if told_by_a_loss else "warning"
    assert {finding.severity for finding in found.values()} == {severity}
    for finding in found.values():
        assert evidence.items() <= finding.evidence.items()


def test_a_training_that_goes_on_in_evaluation_mode():
    found = of_rule(audited(Digits(), LikeEvaluation()), "wrong-mode")
    assert sorted(found) == sorted(BOTH)
    assert {finding.evidence["training_share"] for finding in found.values()} == {0.11}


class Pictures(Digits):
    """Looks at its own pictures after the batch, in training mode."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx % 5 == 0:
            with torch.no_grad():
                self(batch[0])


def test_a_pass_between_batches():
    found = of_rule(audited(Pictures()), "extra-forward")
    assert sorted(found) == sorted(BOTH)
    assert {finding.severity for finding in found.values()} == {"warning"}
    assert {finding.evidence["between_updates"] for finding in found.values()} == {20}, "that of the last batch apart"


class EvaluatesItself(Digits):
    def training_step(self, batch, batch_idx):
        self.net.eval()
        loss = super().training_step(batch, batch_idx)
        self.net.train()
        return loss


def test_a_step_that_runs_the_network_in_evaluation_mode():
    found = of_rule(audited(EvaluatesItself()), "wrong-mode")
    assert {finding.severity for finding in found.values()} == {"warning"}
    assert {finding.evidence["forward_updates"] for finding in found.values()} == {0.0}


class Fixed(Digits):
    """Evaluates its BatchNorm all along, like most detectors that are fine-tuned."""

    def __init__(self, learned, **options):
        super().__init__(**options)
        if learned:
            for x, _ in digits(3):
                self(x)

    def on_train_epoch_start(self):
        self.net[0].eval()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("learned", "severity"), [(True, "info"), (False, "warning")])
def test_evaluation_mode_from_the_first_batch_on_is_a_warning_with_fresh_statistics_alone(learned, severity, affine):
    found = of_rule(audited(Fixed(learned, affine=affine)), "wrong-mode")
    assert sorted(found) == sorted(BOTH)
    assert {finding.severity for finding in found.values()} == {severity}


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
        return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=2, history_size=1, line_search_fn="strong_wolfe")


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


class SiameseByHand(ByHand):
    """Two forward passes of one batch, both trained by."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        one, other = self(x), self(x + 0.3 * torch.randn_like(x))
        self.manual_backward(F.cross_entropy(one, y) + F.cross_entropy(other, y))
        for optimizer in optimizers:
            optimizer.step()


class Siamese(Digits):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y) + F.cross_entropy(self(x + 0.3 * torch.randn_like(x)), y)


@pytest.mark.parametrize(
    ("make", "callbacks", "options"),
    [
        pytest.param(SiameseByHand, (), {}, id="siamese-by-hand"),
        pytest.param(Siamese, (), {"stages": ["static", "passive"]}, id="siamese-without-data"),
        pytest.param(lambda: Fixed(True), (), {"max_epochs": 4}, id="statistics-kept"),
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
    if options.get("stages"):
        return
    frozen = any("is frozen" in row.reason for row in report.not_looked)
    assert (report.layers[0].gap is None) == frozen
    assert frozen == (options == {"max_epochs": 4}), "the two that are frozen by then"
