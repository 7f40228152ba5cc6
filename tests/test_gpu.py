"""What only a CUDA device can show; skipped without one."""

import warnings
from contextlib import contextmanager, nullcontext

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from bn_lightning import fold_batch_norm, recalibrate_batch_norm
from bn_lightning.callbacks import ActivationMonitor, BatchNormAudit, BatchNormMonitor, FoldBatchNorm
from bn_lightning.layers.registry import VARIANTS
from bn_lightning.modules import DigitsDataModule, ImageClassifier
from bn_lightning.monitoring import ActivationWatch, RunningStatisticsWatch
from bn_lightning.networks import ResidualNetwork
from bn_lightning.selection import named_batch_norms

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*determinis.*"),
]
SMALL = {"widths": (8, 16), "blocks": 1}


@contextmanager
def no_waiting():
    """An error where the host waits for the device."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_for_the_device_is_an_error_in_this_file():
    x = torch.zeros(1, device="cuda")
    with no_waiting(), pytest.raises(RuntimeError, match="synchronizing"):
        x.item()
    x.item()


def randomized():
    torch.manual_seed(0)
    model = ResidualNetwork(**SMALL)
    for bn in named_batch_norms(model).values():
        nn.init.normal_(bn.running_mean)
        nn.init.uniform_(bn.running_var, 0.5, 2)
        nn.init.normal_(bn.weight, 1, 0.3)
        nn.init.normal_(bn.bias)
    return model


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 1, 8, 8, generator=generator) * 2 + 1 for n in (32, 32, 7)]


def test_a_sampled_step_and_its_flush_do_not_wait_for_the_device():
    model, (x, *_) = randomized().cuda(), batches()
    x = x.cuda()
    watch = ActivationWatch(gradients=True, histograms=True)
    running = RunningStatisticsWatch(named_batch_norms(model), restore=True)
    scale = torch.full((), 4.0, device="cuda")
    watch.install(model)
    watch.sampling = True
    model(x).sum().backward()  # the first sample allots the buffer
    running.begin()
    running.end(0)
    watch.flush()
    running.read()
    with no_waiting():
        running.begin()
        for _ in range(2):  # the second call merges
            model(x).sum().backward()
        running.end(1)
        finish = watch.start_flush(gradient_scale=scale)
        finish_running = running.start_reading()
    on_device, updates = finish(), finish_running().rows[0].updates
    assert updates == 2
    watch.remove()
    model = model.cpu()
    watch.install(model)
    watch.sampling = True
    for _ in range(2):
        model(x.cpu()).sum().backward()
    here = watch.start_flush(gradient_scale=scale.cpu())()
    for there, expected in ((on_device, here), (on_device.gradients, here.gradients)):
        for name, row in expected.to_dict().items():
            assert there.to_dict()[name]["count"] == row["count"]
            assert there.to_dict()[name]["std"] == pytest.approx(row["std"], rel=1e-3, abs=1e-4), name
    for name, counts in here.histograms.items():
        assert on_device.histograms[name].sum() == counts.sum()


def test_recalibration_agrees_with_the_cpu():
    here, there = randomized(), randomized().cuda()
    recalibrate_batch_norm(here, batches())
    result = recalibrate_batch_norm(there, batches())
    for name, bn in named_batch_norms(there).items():
        reference = named_batch_norms(here)[name]
        torch.testing.assert_close(bn.running_mean.cpu(), reference.running_mean, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(bn.running_var.cpu(), reference.running_var, rtol=1e-3, atol=1e-3)
    result.undo()
    for name, value in randomized().state_dict().items():
        assert torch.equal(there.state_dict()[name].cpu(), value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_folding_on_the_device(dtype):
    model, x = randomized().to("cuda", dtype).eval(), batches()[0].to("cuda", dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = fold_batch_norm(model, x)
    assert {row.action for row in result.report.rows} == {"folded-backward"}
    assert result.report.verified_in == "float64"
    assert result.report.error < 1e-9
    result.undo()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
def test_training_on_the_device_is_bitwise_unchanged(precision, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    def train(callbacks):
        pl.seed_everything(0, verbose=False)
        module, data = ImageClassifier(network_options=SMALL), DigitsDataModule()
        trainer = pl.Trainer(
            accelerator="cuda",
            devices=1,
            max_epochs=2,
            precision=precision,
            deterministic="warn",
            default_root_dir=tmp_path,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=callbacks,
        )
        trainer.fit(module, data)
        trainer.test(module, data, verbose=False)
        return {name: value.cpu() for name, value in module.state_dict().items()}

    monitor, running = ActivationMonitor(every_n_steps=5, gradients=True), BatchNormMonitor(every_n_steps=5)
    audit, fold = BatchNormAudit(max_batches=4), FoldBatchNorm()
    watched, bare = train([monitor, running, audit, fold]), train([])
    for name, value in bare.items():
        assert torch.equal(watched[name], value), name
    assert len(audit.report.layers) == len(named_batch_norms(ResidualNetwork(**SMALL)))
    assert {row.action for row in fold.report.rows} == {"folded-backward"}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "last"])
@pytest.mark.parametrize("name", sorted(set(VARIANTS) - {"noisy"}))
def test_variants_do_what_they_do_on_the_cpu_without_waiting_for_the_device(name, memory_format):
    generator = torch.Generator().manual_seed(2)
    x = (torch.randn(32, 4, 6, 6, generator=generator) * 2 + 1).to(memory_format=memory_format)
    grad = torch.randn(32, 4, 6, 6, generator=generator)
    results = []
    for device in ("cpu", "cuda"):
        layer = VARIANTS[name](4)
        layer.running_mean.copy_(torch.arange(4) / 4)
        nn.init.constant_(layer.num_batches_tracked, 30_000)
        layer, one, back = layer.to(device), x.detach().to(device).requires_grad_(), grad.to(device)
        for warm in (False, True):  # the first backward pass on a device makes handles, and waits
            one.grad = None
            layer.zero_grad()
            with no_waiting() if device == "cuda" and warm else nullcontext():
                y = layer(one)
                y.backward(back)
        results.append(
            [t.cpu() for t in (y.detach(), one.grad, *(p.grad for p in layer.parameters()), *layer.buffers())]
        )
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
