"""The stages that were asked for are made, at the end and at validation, in code and from a command line."""

import math
import warnings

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from callbacks.test_audit_training_step import Noisy, fit, loader, reasons, trainer
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from bn_lightning.auditing import TrainingSettings, audit_batch_norm
from bn_lightning.callbacks import BatchNormAudit, FreezeBatchNorm, RecalibrateBatchNorm
from bn_lightning.callbacks.training_settings import training_settings
from bn_lightning.errors import AuditError


class Net(pl.LightningModule):
    def __init__(self, momentum=0.99):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, weight_decay=0.1)


class Twice(Net):
    """Moves its statistics twice a batch, by a convention and under a decay that are not meant."""

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self(batch[0])
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("given", ["tensor", "batch"])
@pytest.mark.parametrize(
    ("stages", "found"),
    [
        (None, {"decayed-affine", "extra-forward"}),
        (["static"], {"decayed-affine"}),
        (["passive"], {"extra-forward"}),
        (["static", "passive"], {"decayed-affine", "extra-forward"}),
        (["active"], {"extra-forward"}),
    ],
    ids=lambda value: "+".join(sorted(value or ["all"])),  # a set has no order of its own from run to run
)
def test_each_stage_looks_by_itself(stages, found, given):
    module, callback = Twice(), BatchNormAudit(stages=stages)
    if given == "tensor":
        module.example_input_array = torch.randn(2, 3, 5, 5)
    fit(module, callback, max_epochs=1)
    report = callback.report
    slugs = {finding.rule for finding in report.findings}
    assert slugs & {"decayed-affine", "extra-forward"} == found
    assert "momentum-convention" in slugs, "the model itself is looked at in any case"
    asked = stages or ["static", "passive", "active"]
    left = {stage for stage in ("static", "passive", "active") if stage not in asked}
    assert {what for what, why in reasons(report).items() if why == "stages= leaves it out"} == {
        f"{stage} stage" for stage in left
    }
    assert (report.batches > 0) == (report.losses is not None) == ("active" in asked)
    assert "redundant-bias" in slugs, "and one recorded pass of it"


def test_without_data_a_layer_that_runs_twice_is_not_taken_for_an_extra_pass():
    class Shared(Net):
        def forward(self, x):
            return self.net(x.roll(1, 0)) + self.net[2:](self.net[1](self.net[0](x)))

    callback = BatchNormAudit(stages=["passive"])
    fit(Shared(), callback, max_epochs=1)
    assert "extra-forward" not in {finding.rule for finding in callback.report.findings}


def test_an_example_of_several_inputs_is_moved_and_recorded():
    class Pair(Net):
        def __init__(self):
            super().__init__()
            self.example_input_array = {"x": torch.randn(2, 3, 5, 5), "shift": torch.zeros(1)}

        def forward(self, x, shift=0.0):
            return self.net(x + shift)

    callback = BatchNormAudit(stages=["static"])
    fit(Pair(), callback, max_epochs=1, precision="64-true")
    assert "recorded forward pass" not in reasons(callback.report)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": ["passiv"]}, "stages must be a list of some of 'static', 'passive', 'active', got"),
        ({"stages": "active"}, "got 'active'"),
        ({"stages": []}, r"got \[\]"),
        ({"when": "epoch"}, "when must be one of 'end', 'validation', got 'epoch'"),
    ],
    ids=str,
)
def test_arguments_are_checked_at_once(options, message):
    with pytest.raises(AuditError, match=message):
        BatchNormAudit(**options)


def test_a_command_line_can_say_it():
    parser = ArgumentParser()
    parser.add_class_arguments(BatchNormAudit, "audit")
    text = """
audit:
  stages: [static, active]
  when: validation
  max_batches: 5
  include: ['net.*']
  fail_on: error
  step: torch.nn.functional.mse_loss
"""
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # by jsonargparse's version
    callback = instantiate(parser.parse_string(text)).audit
    assert (callback.stages, callback.when, callback.max_batches) == (("static", "active"), "validation", 5)
    assert (callback.include, callback.fail_on) == (("net.*",), "error")
    assert callback.step is F.mse_loss
    assert instantiate(parser.parse_string("audit: {}")).audit.step is None


def test_before_each_validation_a_line_is_told_and_the_report_is_of_the_weights_validated(caplog):
    states, reports = [], []

    class Spy(pl.Callback):
        def on_validation_batch_start(self, trainer, pl_module, *_):
            if not trainer.sanity_checking:
                states.append({key: value.clone() for key, value in pl_module.state_dict().items()})
                reports.append(callback.report)

    fixed = torch.utils.data.TensorDataset(Noisy().x, Noisy().y)
    callback, module = BatchNormAudit(when="validation", max_batches=3), Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with caplog.at_level("INFO"):
            trainer(callback, Spy(), val_check_interval=3, max_epochs=1).fit(
                module, DataLoader(fixed, 8), DataLoader(fixed, 40)
            )
    assert len(states) == 1
    told = [line for line in caplog.messages if "BatchNorm audit before validation" in line]
    assert len(told) == 1
    assert "at step 3: findings: " in told[0]
    twin = Net()
    twin.load_state_dict(states[0])
    expected = audit_batch_norm(twin, DataLoader(fixed, 8), max_batches=3)
    assert [row.gap for row in reports[0].layers] == [row.gap for row in expected.layers]
    assert callback.report is not reports[0]


def test_a_failing_audit_at_validation_never_stops_the_training():
    class Failing(Net):
        def forward(self, x):
            if not self.net[0].training and not self.trainer.validating and self.auditing:
                raise RuntimeError("not today")
            return super().forward(x)

        auditing = False

        def on_validation_start(self):
            self.auditing = True

        def validation_step(self, batch, batch_idx):
            pass

    callback = BatchNormAudit(when="validation", fail_on="error")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitter = trainer(callback)
        with pytest.raises(AuditError, match=r"not possible.*not today"):
            fitter.fit(Failing(), loader(), loader(16))
    assert fitter.global_step == 10, "the training went on to its end"
    assert any("not today" in str(entry.message) for entry in caught)


def test_a_network_frozen_as_a_whole_is_no_failure():
    callback = BatchNormAudit(fail_on="error")
    fit(Net(momentum=0.1), FreezeBatchNorm(), callback, max_epochs=1)
    assert "is frozen" in reasons(callback.report)["active stage"]


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_recalibration_beside_it_leaves_no_gap_and_no_trace(first):
    callbacks = [RecalibrateBatchNorm(when="end", tolerance=None), BatchNormAudit()]
    fit(Net(momentum=0.1), *(callbacks if first else callbacks[::-1]), max_epochs=1)
    gap = callbacks[1].report.layers[0].gap
    assert gap < 0.05 if first else gap > 0.1
    history = [finding for finding in callbacks[1].report.findings if finding.rule == "wrong-mode"]
    assert not history


class Stream(IterableDataset):
    def __iter__(self):
        return iter([Noisy()[index] for index in range(20)])


@pytest.mark.parametrize(
    ("make", "options", "expected"),
    [
        pytest.param(lambda: DataLoader(Noisy(20), 8), {}, (8, 4), id="odd"),
        pytest.param(lambda: DataLoader(Noisy(20), 8, drop_last=True), {}, (8, 8), id="dropped"),
        pytest.param(lambda: DataLoader(Noisy(20), 8), {"limit_train_batches": 2}, (8, 8), id="never-reached"),
        pytest.param(lambda: DataLoader(Noisy(16), 8), {}, (8, 8), id="even"),
        pytest.param(lambda: DataLoader(Noisy(5), 8), {}, (5, 5), id="fewer"),
        pytest.param(
            lambda: DataLoader(Noisy(20), batch_sampler=BatchSampler(SequentialSampler(Noisy(20)), 6, False)),
            {},
            (6, 2),
            id="batch-sampler",
        ),
        pytest.param(lambda: DataLoader(Stream(), 8), {}, (8, None), id="stream"),
        pytest.param(lambda: DataLoader([Noisy()[0]], batch_size=None), {}, (None, None), id="whole-batches"),
        pytest.param(lambda: [DataLoader(Noisy(20), 8), DataLoader(Noisy(20), 4)], {}, (None, None), id="several"),
    ],
)
def test_settings_are_read_from_the_trainer(make, options, expected):
    seen = []

    class Spy(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append(training_settings(trainer, pl_module))

    class Idle(Net):
        def training_step(self, batch, batch_idx):
            return None

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(Spy(), max_epochs=1, **options).fit(Idle(), make())
    assert seen == [TrainingSettings(*expected, processes=1, precision="32-true")]


def test_settings_that_callbacks_make():
    seen = []

    class Mine(StochasticWeightAveraging):
        def on_train_start(self, trainer, pl_module):
            super().on_train_start(trainer, pl_module)
            seen.append(training_settings(trainer, pl_module))

    class ByHand(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))

    fit(Net(), Mine(swa_lrs=0.1), GradientAccumulationScheduler({0: 1, 4: 3}), precision="bf16-mixed")
    assert seen[0].averaging == ("Mine",)
    assert seen[0].accumulate_grad_batches == 3
    assert seen[0].precision == "bf16-mixed"
    assert not seen[0].manual_optimization
    fit(ByHand(), Mine(swa_lrs=0.1))
    assert seen[1].manual_optimization
    assert math.prod((seen[1].accumulate_grad_batches, seen[1].processes)) == 1


def test_averages_in_the_network_are_told_from_their_statistics():
    class Fast(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.5)

    callback = BatchNormAudit()
    swa = StochasticWeightAveraging(swa_lrs=0.5, swa_epoch_start=1)
    torch.manual_seed(0)
    # Without an epoch to come the average is put in place and its statistics are not measured.
    fit(Fast(momentum=0.1), swa, callback, max_epochs=-1, max_steps=40)
    found = {finding.rule: finding.evidence for finding in callback.report.findings}
    assert "averaged-weights" in found
