"""What only a watched training shows is found at its layers, and healthy trainings of many kinds have no finding."""

import copy
from contextlib import nullcontext

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from auditing.faults.catalogue_steps import AfterTheBatch, AfterTheEpoch, InEvaluation, Standing
from auditing.faults.catalogue_trainings import FAULTS, LikeEvaluation, Recomputing, TwoViews
from auditing.faults.trainings import Digits, audited, train
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.utils.checkpoint import checkpoint

import bn_lightning as bnl
from bn_lightning.callbacks import BatchNormAudit, FreezeBatchNorm, RecalibrateBatchNorm

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
    severity = "error" if slug == "wrong-mode" else "warning"
    if slug == "extra-forward" and stages is not None:
        severity = "info"  # without a loss reading the second pass may be one that training learns from
    assert {finding.severity for finding in found.values()} == {severity}
    for finding in found.values():
        assert evidence.items() <= finding.evidence.items()


def test_a_training_that_goes_on_in_evaluation_mode():
    found = of_rule(audited(Digits(), LikeEvaluation()), "wrong-mode")
    assert sorted(found) == sorted(BOTH)
    assert {finding.evidence["training_share"] for finding in found.values()} == {0.11}


class Looking(pl.Callback):
    on_train_batch_end = lambda self, trainer, module, outputs, batch, batch_idx: module(batch[0])  # noqa: E731


@pytest.mark.parametrize("stages", [None, ["static", "passive"]], ids=["all", "without-data"])
@pytest.mark.parametrize(
    ("module", "callbacks", "updates"),
    [
        pytest.param(AfterTheBatch, (), 40, id="after-each-batch"),
        pytest.param(AfterTheEpoch, (), 2, id="after-each-epoch"),
        pytest.param(Digits, (Looking(),), 40, id="callback-behind-the-audit"),
    ],
)
def test_forward_passes_between_batches(module, callbacks, updates, stages):
    audit = BatchNormAudit(stages=stages)
    train(module(), audit, *callbacks, max_epochs=2)
    found = of_rule(audit.report, "extra-forward")
    assert sorted(found) == sorted(BOTH)
    assert {finding.severity for finding in found.values()} == {"warning"}
    assert {finding.evidence["between_updates"] for finding in found.values()} == {updates}


@pytest.mark.parametrize("stages", [None, ["static", "passive"]], ids=["all", "without-data"])
def test_a_step_that_evaluates(stages):
    found = of_rule(audited(InEvaluation(), stages=stages, max_epochs=2), "wrong-mode")
    assert {name: finding.severity for name, finding in found.items()} == dict.fromkeys(BOTH, "warning")


def test_half_of_the_network_at_a_learning_rate_of_0():
    found = of_rule(audited(Standing(), max_epochs=2), "frozen-weights-moving-statistics")
    assert sorted(found) == sorted(BOTH)
    assert all("has a learning rate of 0" in finding.message for finding in found.values())


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


class Siamese(ByHand):
    """Two views by hand, both with gradient."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = sum(F.cross_entropy(self(x + 0.1 * torch.randn_like(x)), y) for _ in range(2))
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        if self.trainer.is_last_batch:
            for schedule in self.lr_schedulers():
                schedule.step()


class Adversarial(ByHand):
    """A GAN: its critic runs three times a batch, its generator twice."""

    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 64))

    def fake(self, x):
        return self.generator(torch.randn(len(x), 4)).view(-1, 1, 8, 8)

    def training_step(self, batch, batch_idx):
        x, _ = batch
        for_critic, for_generator = self.optimizers()
        critic = F.softplus(-self(x)[:, 0]).mean() + F.softplus(self(self.fake(x).detach())[:, 0]).mean()
        for_critic.zero_grad()
        self.manual_backward(critic)
        for_critic.step()
        generator = F.softplus(-self(self.fake(x))[:, 0]).mean()
        for_generator.zero_grad()
        self.manual_backward(generator)
        for_generator.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), lr=1e-4) for part in (self.net, self.generator)]


class Taught(Digits):
    """A teacher that averages the student and runs without gradient, in training mode, as BYOL's."""

    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        x, y = batch
        with torch.no_grad():
            target = self.teacher(x + 0.1 * torch.randn_like(x)).softmax(1)
        logits = self(x)
        return F.cross_entropy(logits, y) + 0.1 * F.cross_entropy(logits, target)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        for teacher, student in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            teacher.data.lerp_(student.data, 0.1)


class Distilled(Taught):
    """A teacher that stays as it is, whose statistics must not move."""

    on_train_batch_end = pl.LightningModule.on_train_batch_end


def test_a_teacher_that_stands_still_is_frozen_by_half():
    found = of_rule(audited(Distilled(), max_epochs=2), "frozen-weights-moving-statistics")
    assert sorted(found) == ["teacher.0.1", "teacher.0.4"]


@pytest.mark.parametrize("module", [Siamese, Adversarial], ids=lambda each: each.__name__)
def test_passes_that_are_all_meant_are_a_question_and_no_accusation(module):
    report = audited(module())
    found = of_rule(report, "extra-forward")
    assert set(BOTH) <= set(found)
    assert {finding.severity for finding in found.values()} == {"info"}


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
        pytest.param(Siamese, (), {}, id="two-views-by-hand"),
        pytest.param(Taught, (), {}, id="teacher-that-averages"),
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


@pytest.mark.parametrize(
    "callback",
    [
        pytest.param(lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=1), id="swa"),
        pytest.param(WeightAveraging, id="ema"),
        pytest.param(RecalibrateBatchNorm, id="recalibrated"),
        pytest.param(lambda: FreezeBatchNorm(from_epoch=1), id="frozen-later"),
    ],
)
@pytest.mark.parametrize("first", [True, False], ids="audit-first={}".format)
def test_what_callbacks_write_between_batches_is_no_forward_pass(callback, first):
    audit = BatchNormAudit(stages=["static", "passive"])
    given = (audit, callback()) if first else (callback(), audit)
    train(Digits(), *given, max_epochs=3)
    assert not of_rule(audit.report, "extra-forward")
