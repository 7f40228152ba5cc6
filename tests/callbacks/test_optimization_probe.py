"""Training with probes is bitwise the training without, their results are those of direct calls, and cost is stated."""

import copy
import csv
import os
import socket
import subprocess
import sys
import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bn_lightning.callbacks import ActivationMonitor, OptimizationProbe, optimization_probe
from bn_lightning.errors import BatchNormError
from bn_lightning.layers import convert_batch_norm
from bn_lightning.probes import branch_variance, gradient_predictiveness, internal_covariate_shift
from bn_lightning.probes.objective import Objective
from bn_lightning.probes.registry import probe_call

ALL = {
    "loss_landscape": {"points": 3},
    "gradient_predictiveness": {"points": 2},
    "effective_smoothness": {"points": 2},
    "relative_loss": {"points": 3},
    "internal_covariate_shift": {"exclude": ["head"]},
    "gradient_coherence": {},
    "gradient_tails": {},
    "gradient_norms_by_depth": {},
    "channel_moments_by_depth": {},
    "activation_percentiles": {"of": "input"},
    "branch_variance": {},
    "max_stable_learning_rate": {"steps": 2, "ratio": 4.0},
}


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.3))

    def forward(self, x):
        branch = self.branch(x)
        branch += x
        return branch


def build(module):
    torch.manual_seed(0)
    module.first, module.blocks = nn.Linear(6, 8), nn.Sequential(Block(8), Block(8))
    module.head, module.losses = nn.Linear(8, 3), []


class Lit(pl.LightningModule):
    def __init__(self):
        super().__init__()
        build(self)

    def forward(self, x):
        return self.head(self.blocks(self.first(x)))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x + 0.1 * torch.randn_like(x)), y)
        self.log("loss", loss)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Standalone(pytorch_lightning.LightningModule):
    def __init__(self):
        super().__init__()
        build(self)

    forward, training_step, configure_optimizers = Lit.forward, Lit.training_step, Lit.configure_optimizers


class Manual(Lit):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        optimizer.step()


def loader():
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(40, 6, generator=generator), torch.randint(3, (40,), generator=generator))
    return DataLoader(data, 8, shuffle=True)


def fit(module, *callbacks, family=pl, loader=loader, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers, checkpoint folders and the like
        warnings.filterwarnings("error", message="OptimizationProbe could not run")
        options = {"logger": False, "max_epochs": 2, "accelerator": "cpu", **options}
        trainer = family.Trainer(
            callbacks=list(callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            **options,
        )
        torch.manual_seed(7)
        np.random.seed(7)
        trainer.fit(module, loader())
    return trainer


def everything(module, trainer):
    tensors = [*module.state_dict().values()]
    tensors += [value for state in trainer.optimizers[0].state.values() for value in state.values()]
    return (
        [tensor.numpy().tobytes() for tensor in tensors],
        module.losses,
        [child.training for child in module.modules()],
        [parameter.grad is None for parameter in module.parameters()],
        (torch.get_rng_state().numpy().tobytes(), str(np.random.get_state())),
        {key: value.item() for key, value in trainer.callback_metrics.items()},
    )


CASES = {
    "plain": {},
    "standalone": {"family": pytorch_lightning},
    "accumulated": {"accumulate_grad_batches": 2},
    "bf16": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_training_is_bitwise_the_training_without(options):
    def module():
        made = (Standalone if options.get("family") is pytorch_lightning else Lit)()
        made.blocks[0].branch[1].eval()
        convert_batch_norm(made, "renorm", include=("blocks.1.*",))
        return made

    probe = OptimizationProbe(list(ALL), every_n_steps=2, options=ALL)
    probed, plain = module(), module()
    found = everything(probed, fit(probed, probe, **options))
    assert probe.results.keys() == ALL.keys()
    assert found == everything(plain, fit(plain, **options))


def test_a_monitor_of_activations_sees_training_alone(tmp_path):
    def history(*around):
        monitor = ActivationMonitor(every_n_steps=1, alerts=False)
        before, after = around
        fit(Lit(), *before, monitor, *after, default_root_dir=tmp_path)
        return monitor.history.values("count").tolist()

    alone = history([], [])
    probe = OptimizationProbe(["branch_variance"], every_n_steps=1)
    assert history([probe], []) == alone == history([], [probe])


class FirstBatch(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 0:
            self.module = copy.deepcopy(pl_module)
            self.batch = batch


def test_results_are_those_of_direct_calls_on_the_batch_before_its_step():
    names = ["gradient_predictiveness", "internal_covariate_shift", "branch_variance"]
    probe, first = OptimizationProbe(names, every_n_steps=1000), FirstBatch()
    fit(Lit(), first, probe)

    def step(module, batch):
        return F.cross_entropy(module(batch[0] + 0.1 * torch.randn_like(batch[0])), batch[1])

    given = first.module, None, first.batch
    assert probe.results == {
        "gradient_predictiveness": gradient_predictiveness(*given, learning_rate=1e-2, step=step),
        "internal_covariate_shift": internal_covariate_shift(*given, learning_rate=1e-2, step=step),
        "branch_variance": branch_variance(first.module, first.batch, step=step),
    }
    chosen = OptimizationProbe(names[:1], every_n_steps=1000, learning_rate=0.5, step=step)
    fit(Lit(), chosen)
    expected = gradient_predictiveness(*given, learning_rate=0.5, step=step)
    assert chosen.results["gradient_predictiveness"] == expected


def test_of_the_micro_batches_of_a_step_the_first_is_probed():
    probe = OptimizationProbe(["activation_percentiles"], every_n_steps=2)
    fit(Lit(), probe, accumulate_grad_batches=2)
    assert probe.percentiles.steps == [0, 2, 4]


def test_probes_run_in_the_precision_of_training():
    seen = []

    def step(module, batch):
        seen.append(torch.is_autocast_enabled("cpu"))
        return F.cross_entropy(module(batch[0]), batch[1])

    for precision, expected in (("bf16-mixed", True), ("32-true", False)):
        seen.clear()
        fit(Lit(), OptimizationProbe(["branch_variance"], step=step), precision=precision)
        assert seen == [expected]


@pytest.mark.parametrize("name", ALL)
def test_no_probe_takes_more_passes_than_it_states(name, monkeypatch):
    module, calls, backward = Lit(), [], []
    pair = next(iter(loader()))
    module.first.register_forward_hook(lambda *_: calls.append(1))
    own = Objective.gradients_of
    monkeypatch.setattr(Objective, "gradients_of", lambda *args: backward.append(1) or own(*args))
    call = probe_call(name, ALL[name])
    call.measure(module, pair, lambda module, batch: F.cross_entropy(module(batch[0]), batch[1]), 0.1)
    stated = call.passes(module)
    taken = len(calls), len(backward)
    if name == "max_stable_learning_rate":
        assert taken[0] == taken[1] <= stated.forward == stated.backward
    else:
        assert taken == (stated.forward, stated.backward)


def test_the_cost_is_said_beforehand(monkeypatch):
    said = []
    monkeypatch.setattr(optimization_probe, "rank_zero_info", said.append)
    names = ["loss_landscape", "internal_covariate_shift", "branch_variance"]
    fit(Lit(), OptimizationProbe(names, every_n_steps=5))
    assert said == [
        "OptimizationProbe makes up to 14 extra forward and 5 extra backward passes every 5 optimizer steps, some 2 "
        "times: loss_landscape 9 and 1, internal_covariate_shift 4 and 4, branch_variance 1 and 0."
    ]


def test_scalars_and_pictures_are_logged(tmp_path):
    probe = OptimizationProbe(["loss_landscape", "activation_percentiles", "gradient_tails"], every_n_steps=5)
    fit(Lit(), probe, logger=CSVLogger(tmp_path, name="", version="log"))
    with (tmp_path / "log" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["probe/loss_landscape/loss_low"]]
    assert [int(row["step"]) for row in rows] == [0, 5] == probe.percentiles.steps
    assert float(rows[1]["probe/loss_landscape/loss_low"]) == probe.results["loss_landscape"].low
    norm = probe.results["gradient_tails"].layers[0].norm
    assert float(rows[1]["probe/gradient_tails/first/gradient_norm"]) == norm
    figures = tmp_path / "log" / "figures" / "probe"
    assert sorted(path.relative_to(figures).as_posix() for path in figures.rglob("*.png")) == [
        "activation_percentiles.png",
        "activation_percentiles/over_time.png",
        "gradient_tails.png",
        "loss_landscape.png",
    ]


def test_of_many_layers_only_the_network_s_own_scalars_are_logged(tmp_path, monkeypatch):
    monkeypatch.setattr(optimization_probe, "_MOST_SCALARS", 3)
    fit(Lit(), OptimizationProbe(["branch_variance"]), logger=CSVLogger(tmp_path, name="", version="log"))
    with (tmp_path / "log" / "metrics.csv").open() as file:
        names = {name for name in csv.DictReader(file).fieldnames if name.startswith("probe")}
    assert names == {"probe/branch_variance/effective_depth"}


def test_manual_optimization_needs_a_step():
    with pytest.raises(BatchNormError, match=r"optimizes by itself.*OptimizationProbe\(step=lambda module, batch"):
        fit(Manual(), OptimizationProbe())
    plain, probed = Manual(), Manual()
    probe = OptimizationProbe(step=lambda module, batch: F.cross_entropy(module(batch[0]), batch[1]), every_n_steps=2)
    assert everything(probed, fit(probed, probe)) == everything(plain, fit(plain))
    assert probe.results["loss_landscape"].loss > 0


@pytest.mark.filterwarnings("always:OptimizationProbe could not run")
def test_a_step_that_would_train_is_refused():
    probe = OptimizationProbe(step=lambda module, batch: module.optimizers().step())
    with pytest.warns(UserWarning, match=r"an optimizer was to step.*OptimizationProbe\(step="):
        told(Manual(), probe)


def told(module, probe):
    """Fit, and let its warnings through."""
    trainer = pl.Trainer(
        callbacks=[probe],
        logger=False,
        max_epochs=1,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(num_workers|logging interval|multiple copies|LeafSpec).*")
        torch.manual_seed(7)
        np.random.seed(7)
        trainer.fit(module, loader())
    return trainer


def test_what_fails_is_told_once_and_training_goes_on_unchanged():
    calls = []

    def step(module, batch):
        calls.append(module(batch[0]))
        raise ArithmeticError("no loss today")

    probed, plain = Lit(), Lit()
    probe = OptimizationProbe(["loss_landscape", "branch_variance"], every_n_steps=1, step=step)
    with pytest.warns(UserWarning, match="could not run") as seen:
        found = everything(probed, told(probed, probe))
    said = [str(each.message) for each in seen if "could not run" in str(each.message)]
    assert [name in text for name, text in zip(("loss_landscape", "branch_variance"), said, strict=True)] == [True] * 2
    assert said[0].endswith(
        "at optimizer step 0, tries again every 1 steps and does not tell again: ArithmeticError: no loss today"
    )
    assert len(calls) == 2 * 5
    assert probe.results == {}
    assert found == everything(plain, fit(plain, max_epochs=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probes": ["loss_landscap"]}, "did you mean 'loss_landscape'"),
        ({"probes": ["population_gap"]}, "needs many batches"),
        ({"probes": []}, "names no probe"),
        ({"probes": "loss_landscape"}, "bare string"),
        ({"options": {"loss_landscape": {"point": 3}}}, "no option 'point' .did you mean 'points'"),
        ({"options": {"branch_variance": {}}}, "'branch_variance', which probes= lacks"),
        ({"every_n_steps": 0}, "at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(BatchNormError, match=message):
        OptimizationProbe(**options)


def process(rank, folder):
    torch.set_num_threads(1)
    found = {}
    for name in ("plain", "probed"):
        module = Lit()
        probe = OptimizationProbe(["loss_landscape", "internal_covariate_shift", "gradient_coherence"], every_n_steps=2)
        callbacks = [probe] if name == "probed" else []
        logger = CSVLogger(folder, name="", version=name)
        trainer = fit(module, *callbacks, devices=2, strategy="ddp", logger=logger)
        found[name] = everything(module, trainer)
    assert probe.results["loss_landscape"].loss > 0
    assert found["plain"] == found["probed"]
    with pytest.raises(BatchNormError, match="max_stable_learning_rate takes as many steps as each process's own"):
        fit(Lit(), OptimizationProbe(["max_stable_learning_rate"]), devices=2, strategy="ddp")
    torch.save(probe.results["loss_landscape"].loss, os.path.join(folder, f"{rank}.pt"))


@pytest.mark.slow
def test_two_processes_of_ddp(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path)],
            env={**os.environ, "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [running.communicate(timeout=120)[0] for running in both]
    assert [running.returncode for running in both] == [0, 0], "\n".join(outputs)
    assert torch.load(tmp_path / "0.pt") != torch.load(tmp_path / "1.pt")  # each its own batch


if __name__ == "__main__":
    process(int(sys.argv[1]), sys.argv[2])
