"""The private names this library stands on, one test each: a new torch or Lightning that drops one is named here."""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from bn_lightning.internals import (
    DropoutBase,
    LossBase,
    add_png,
    assert_async,
    averaged_networks,
    before_batch_transfer,
    compiled_original,
    drop_hooks,
    gradient_scale,
    hooks_on,
    in_backward,
    in_reentrant_checkpoint,
    is_compiled,
    logging_step,
    never_compiled,
)


def test_orig_mod_of_a_compiled_module():
    layer = nn.Linear(2, 2)
    assert compiled_original(torch.compile(layer, backend="eager")) is layer
    assert compiled_original(layer) is None


def test_batches_that_stepped_of_the_epoch_loop():
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.fit_loop.epoch_loop._batches_that_stepped = 7
    assert logging_step(trainer) == 7


def test_on_before_batch_transfer_of_a_module():
    class Doubling(pl.LightningModule):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return 2 * batch

    assert before_batch_transfer(Doubling(), 3) == 6


def test_generate_state_key_of_a_callback():
    assert "9" in pl.Callback()._generate_state_key(nine=9)


@pytest.mark.parametrize(
    ("register", "kind"),
    [
        ("register_forward_pre_hook", "forward pre hooks"),
        ("register_forward_hook", "forward hooks"),
        ("register_full_backward_pre_hook", "backward pre hooks"),
        ("register_full_backward_hook", "backward hooks"),
    ],
)
def test_hook_tables_of_a_module(register, kind):
    layer = nn.Linear(2, 2)
    assert hooks_on(layer) == []
    getattr(layer, register)(lambda *args: None)
    assert hooks_on(layer) == [kind]
    drop_hooks(layer)
    assert hooks_on(layer) == []


def test_bases_of_layers():
    assert issubclass(nn.SyncBatchNorm, _BatchNorm)
    assert issubclass(nn.Dropout2d, DropoutBase)
    assert issubclass(nn.CrossEntropyLoss, LossBase)


def test_assertion_on_the_device():
    assert hasattr(torch, "_assert_async")
    assert_async(torch.tensor(True), "unseen")
    with pytest.raises(RuntimeError, match="seen"):
        assert_async(torch.tensor(False), "seen")


def test_what_the_compiler_leaves_alone():
    assert hasattr(torch, "_disable_dynamo")
    seen = never_compiled(lambda x: x if torch.compiler.is_compiling() else -x)
    x = torch.ones(1)
    assert torch.equal(torch.compile(lambda x: seen(x + 1), backend="eager")(x), -(x + 1))


def test_how_a_compiled_module_is_known():
    compiled, plain = nn.Linear(2, 2), nn.Linear(2, 2)
    compiled.compile(backend="eager")
    assert is_compiled(compiled)
    assert is_compiled(torch.compile(plain, backend="eager"))
    assert not is_compiled(plain)


def test_file_writer_of_a_summary_writer(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        assert add_png(writer, "picture", b"png", (2, 3), 7)
    log = EventAccumulator(str(tmp_path))
    log.Reload()
    (image,) = log.Images("picture")
    assert (image.step, image.height, image.width, image.encoded_image_string) == (7, 2, 3, b"png")
    assert not add_png(object(), "picture", b"png", (2, 3), 7)


def test_scale_of_a_gradient_scaler():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    trainer = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler))
    assert gradient_scale(trainer) is None, "it has none before the first loss"
    scaler.scale(torch.ones(()))
    assert gradient_scale(trainer) == 8.0
    assert gradient_scale(SimpleNamespace(precision_plugin=SimpleNamespace(scaler=None))) is None


def test_graph_task_of_a_backward_pass():
    assert hasattr(torch._C, "_current_graph_task_id")
    seen, x = [], torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _: seen.append(in_backward()))
    y.backward()
    assert (seen, in_backward()) == ([True], False)


def test_callers_of_a_reentrant_checkpoint():
    seen = []

    def body(x):
        seen.append(in_reentrant_checkpoint())
        return 2 * x

    x = torch.ones(1, requires_grad=True)
    checkpoint(body, x * 1, use_reentrant=True).backward()
    checkpoint(body, x * 1, use_reentrant=False)
    with torch.no_grad(), pytest.warns(UserWarning, match="None of the inputs"):
        checkpoint(body, x * 1, use_reentrant=True)
    assert seen == [True, False, False, False]


def test_networks_that_weight_averaging_saves():
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import WeightAveraging

    averaging, module = WeightAveraging(), pl.LightningModule()
    trainer = SimpleNamespace(callbacks=[pl.Callback(), averaging])
    assert averaged_networks(trainer) == []
    averaging.setup(trainer, module, "fit")
    (network,) = averaged_networks(trainer)
    assert network is averaging._average_model.module
