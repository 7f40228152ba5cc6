"""Folding for a stage: seen by the stage, gone afterwards, and never in a checkpoint."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from bn_lightning.callbacks.fold import FoldBatchNorm
from bn_lightning.errors import BatchNormError, FoldError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*Trainer.fit. stopped|.*is smaller than the logging interval"),
]


class Classifier(pl.LightningModule):
    def __init__(self, fails=False, batch_of="pair"):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(72, 4),
        )
        self.net[1].running_mean.normal_(0.3, 0.5)
        self.net[1].running_var.uniform_(0.2, 3.0)
        self.fails, self.batch_of = fails, batch_of
        self.seen, self.outputs = [], []

    def forward(self, x):
        return self.net(x)

    def unpack(self, batch):
        return batch["image"] if isinstance(batch, dict) else batch[0] if isinstance(batch, tuple | list) else batch

    def training_step(self, batch, batch_idx):
        return self(self.unpack(batch)).square().mean()

    def step(self, batch, batch_idx):
        self.seen.append(type(self.net[1]).__name__)
        if self.fails:
            raise RuntimeError("boom")
        self.outputs.append(self(self.unpack(batch)))
        return self.outputs[-1]

    validation_step = test_step = predict_step = step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def trainer(*callbacks, **options):
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "barebones"), False
    )
    return pl.Trainer(accelerator="cpu", devices=1, callbacks=list(callbacks), **(quiet | {"max_epochs": 1} | options))


def loader(kind="pair"):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(12, 3, 5, 5, generator=generator)
    items = {
        "pair": [(image, 1) for image in images],
        "tensor": list(images),
        "dict": [{"image": image} for image in images],
        "label-first": [(1, image) for image in images],
    }
    return DataLoader(items[kind], batch_size=4)


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Classifier()


def bits(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_same(a, b):
    assert list(a) == list(b)
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("stage", ["test", "predict", "validate"])
@pytest.mark.parametrize("source", ["first-batch", "example-input"])
@pytest.mark.parametrize("inference_mode", [True, False], ids=["inference", "no-grad"])
def test_the_stage_sees_the_folded_network_and_leaves_none(module, stage, source, inference_mode):
    if source == "example-input":
        module.example_input_array = torch.randn(2, 3, 5, 5)
    before = bits(module)
    modules = [(name, id(each)) for name, each in module.named_modules()]
    callback = FoldBatchNorm(stages=[stage])
    getattr(trainer(inference_mode=inference_mode), stage)(module, loader())
    expected, module.outputs = module.outputs, []
    module.seen.clear()
    getattr(trainer(callback, inference_mode=inference_mode), stage)(module, loader())
    assert module.seen == ["Identity"] * 3
    assert [row.action for row in callback.report.rows] == ["folded-backward"]
    assert callback.report.error <= 1e-9
    for found, reference in zip(module.outputs, expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-5)
        assert not torch.equal(found, reference)
    assert_same(bits(module), before)
    assert [(name, id(each)) for name, each in module.named_modules()] == modules
    assert not module._state_dict_pre_hooks
    assert not module._state_dict_hooks


@pytest.mark.parametrize("stage", ["test", "predict", "validate"])
def test_other_stages_are_left_alone(module, stage):
    stages = [other for other in ("test", "predict", "validate") if other != stage]
    callback = FoldBatchNorm(stages=stages)
    getattr(trainer(callback), stage)(module, loader())
    assert module.seen == ["BatchNorm2d"] * 3
    assert callback.report is None


def test_validation_inside_fit_is_not_folded(module):
    trainer(FoldBatchNorm(stages=["validate"]), num_sanity_val_steps=1).fit(module, loader(), loader())
    assert set(module.seen) == {"BatchNorm2d"}


def test_fit_after_test_is_bitwise_the_same():
    """Also the momentum buffers, the dropout masks and the running statistics."""
    endings = []
    for callbacks in ([], [FoldBatchNorm()]):
        torch.manual_seed(0)
        module = Classifier()
        runner = trainer(*callbacks, max_epochs=2)
        runner.test(module, loader(), verbose=False)
        runner.fit(module, loader(), loader())
        runner.test(module, loader(), verbose=False)
        endings.append((bits(module), torch.get_rng_state()))
    assert_same(endings[0][0], endings[1][0])
    assert torch.equal(endings[0][1], endings[1][1])


def test_an_exception_in_the_stage_restores(module):
    module.fails = True
    before = bits(module)
    with pytest.raises(RuntimeError, match="boom"):
        trainer(FoldBatchNorm()).test(module, loader(), verbose=False)
    assert module.seen == ["Identity"]
    assert_same(bits(module), before)
    assert isinstance(module.net[1], nn.BatchNorm2d)


class SaveInTheMiddle(pl.Callback):
    def __init__(self, path):
        self.path = path

    def on_test_batch_end(self, trainer, pl_module, *args):
        assert isinstance(pl_module.net[1], nn.Identity)
        self.weights = pl_module.net[0].weight.clone()
        for weights_only in (False, True):
            trainer.save_checkpoint(self.path / f"{weights_only}.ckpt", weights_only=weights_only)
        assert isinstance(pl_module.net[1], nn.Identity)
        assert torch.equal(pl_module.net[0].weight, self.weights)


def test_a_checkpoint_saved_in_the_stage_is_unfolded(module, tmp_path):
    before = bits(module)
    saver = SaveInTheMiddle(tmp_path)
    trainer(FoldBatchNorm(), saver).test(module, loader(), verbose=False)
    assert not torch.equal(saver.weights, before["net.0.weight"])
    for weights_only in (False, True):
        saved = torch.load(tmp_path / f"{weights_only}.ckpt", weights_only=False)["state_dict"]
        assert_same(saved, before)


def test_a_checkpoint_holds_the_folded_network_if_asked(module, tmp_path):
    saver = SaveInTheMiddle(tmp_path)
    trainer(FoldBatchNorm(save_folded=True), saver).test(module, loader(), verbose=False)
    for weights_only in (False, True):
        saved = torch.load(tmp_path / f"{weights_only}.ckpt", weights_only=False)["state_dict"]
        assert torch.equal(saved["net.0.weight"], saver.weights)
        assert "net.1.running_mean" not in saved
        assert "net.0.bias" in saved


class Wide(Classifier):
    """A forward fold, a fold through a concatenation, and a BatchNorm that nothing takes up."""

    def __init__(self):
        super().__init__()
        self.net[1] = nn.BatchNorm2d(8)
        self.a, self.b, self.both = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(4)
        self.ahead, self.next, self.alone = nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.both(torch.cat([self.a(x), self.b(x)], 1)).relu()
        return self.net(self.alone(self.next(self.ahead(x)).tanh()).sigmoid())


def test_every_kind_of_fold_serves_a_stage_and_comes_back():
    torch.manual_seed(0)
    module = Wide()
    before = bits(module)
    trainer().test(module, loader(), verbose=False)
    expected, module.outputs = module.outputs, []
    callback = FoldBatchNorm(standalone="affine")
    trainer(callback).test(module, loader(), verbose=False)
    assert {row.name: row.action for row in callback.report.rows} == {
        "net.1": "folded-backward",
        "both": "folded-backward",
        "ahead": "folded-forward",
        "alone": "affine",
    }
    said = "Watched in this stage by the order of their calls only: 'both' (it is folded into several layers), 'ahead'"
    assert said in str(callback.report)
    for found, reference in zip(module.outputs, expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-5)
    assert_same(bits(module), before)
    trainer(callback).fit(module, loader(), loader())


@pytest.mark.parametrize(
    "use", [lambda module, x: module.a(x), lambda module, x: module.next(x[:, :1].repeat(1, 4, 1, 1))]
)
def test_a_step_that_uses_a_layer_of_a_wide_fold_is_refused(use):
    class Using(Wide):
        def test_step(self, batch, batch_idx):
            super().step(batch, batch_idx)
            self.hidden = use(self, batch[0]).sum()

    torch.manual_seed(0)
    module = Using()
    before = bits(module)
    with pytest.raises(FoldError, match=r"were called in this order, but '(both|ahead)' is folded into"):
        trainer(FoldBatchNorm()).test(module, loader(), verbose=False)
    assert_same(bits(module), before)


def test_an_unknown_fate_is_refused_at_once():
    with pytest.raises(FoldError, match="'keep' or 'affine', got 'drop'"):
        FoldBatchNorm(standalone="drop")


@pytest.mark.parametrize("kind", ["pair", "tensor"])
def test_batches_whose_input_is_known(module, kind):
    trainer(FoldBatchNorm()).test(module, loader(kind), verbose=False)
    assert set(module.seen) == {"Identity"}


@pytest.mark.parametrize("kind", ["dict", "label-first"])
def test_a_batch_whose_input_is_unknown_is_refused(module, kind):
    before = bits(module)
    words = "dict" if kind == "dict" else "Given|input|argument"
    with pytest.raises(FoldError, match=words):
        trainer(FoldBatchNorm()).test(module, loader(kind), verbose=False)
    assert_same(bits(module), before)


def test_the_refusal_names_the_cure_and_the_cure_works(module):
    with pytest.raises(FoldError, match="example_input_array"):
        trainer(FoldBatchNorm()).test(module, loader("dict"), verbose=False)
    module.example_input_array = {"x": torch.randn(2, 3, 5, 5)}
    trainer(FoldBatchNorm()).test(module, loader("dict"), verbose=False)
    assert set(module.seen) == {"Identity"}


def test_a_list_of_example_inputs_is_positional_as_in_lightning():
    class Scaled(Classifier):
        def forward(self, x, scale=None):
            return self.net(x) if scale is None else self.net(x) * scale

    module = Scaled()
    module.example_input_array = [torch.randn(2, 3, 5, 5), torch.tensor(2)]
    trainer(FoldBatchNorm()).test(module, loader(), verbose=False)
    assert set(module.seen) == {"Identity"}


def test_low_precision(module):
    module.example_input_array = torch.randn(2, 3, 5, 5)
    callback = FoldBatchNorm()
    trainer(callback, precision="bf16-true").test(module, loader(), verbose=False)
    assert set(module.seen) == {"Identity"}
    assert callback.report.native_dtype == "bfloat16"


def test_a_module_without_batch_norm_is_refused(module):
    module.net[1] = nn.Identity()
    with pytest.raises(FoldError, match="Classifier has no BatchNorm layer"):
        trainer(FoldBatchNorm()).test(module, loader(), verbose=False)


def test_a_module_without_forward_is_refused():
    class Stepwise(Classifier):
        forward = pl.LightningModule.forward

        def test_step(self, batch, batch_idx):
            self.net(batch[0])

    with pytest.raises(FoldError, match=r"define `forward` in Stepwise.*set self\.example_input_array"):
        trainer(FoldBatchNorm()).test(Stepwise(), loader(), verbose=False)


def test_nothing_folded_is_said(module):
    module.net[1].register_forward_hook(lambda *args: None)
    with pytest.warns(UserWarning, match=r"folded no layer of Classifier.*'net\.1', stays for hook"):
        trainer(FoldBatchNorm()).test(module, loader(), verbose=False)
    assert set(module.seen) == {"BatchNorm2d"}


def test_patterns_reach_the_fold(module):
    callback = FoldBatchNorm(exclude=["net.1"])
    with pytest.warns(UserWarning, match="excluded"):
        trainer(callback).test(module, loader(), verbose=False)
    assert callback.report.rows[0].reason == "excluded"


def test_the_report_is_printed_once(module, capsys):
    trainer(FoldBatchNorm()).test(module, loader(), verbose=False)
    printed = capsys.readouterr().out
    assert printed.count("folded 1 of 1") == 1
    assert "net.1   folded-backward   net.0" in printed


@pytest.mark.parametrize("stages", ["test", ["fit"], ["test", "fit"]], ids=str)
def test_unknown_stages_are_refused(stages):
    with pytest.raises(FoldError, match="'test', 'predict', 'validate'"):
        FoldBatchNorm(stages=stages)


def test_its_arguments_come_from_a_file():
    parser = ArgumentParser()
    parser.add_class_arguments(FoldBatchNorm, "fold")
    text = '{"fold": {"stages": ["predict"], "include": ["net.*"]}}'
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # by jsonargparse's version
    callback = instantiate(parser.parse_string(text)).fold
    assert (callback.stages, callback.include, callback.exclude) == (("predict",), ("net.*",), ())


def test_both_trainer_families_take_it(module):
    standalone = pytest.importorskip("pytorch_lightning")
    assert isinstance(FoldBatchNorm(), standalone.Callback)
    assert isinstance(FoldBatchNorm(), pl.Callback)
    assert [each for each in module.modules() if isinstance(each, _BatchNorm)]


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_bare_string_is_no_list_of_patterns(option):
    with pytest.raises(BatchNormError, match=rf"{option}=.*\['net\.b\*'\]"):
        FoldBatchNorm(**{option: "net.b*"})


def features_of_an_inner_layer(module, x):
    return F.relu(module.net[0](x)).mean()


def an_inner_layer_beside_the_forward(module, x):
    y = module.net[0](x)
    module.hidden = y
    return module(x)


def a_branch_not_recorded(module, x):
    return module(x) if len(module.seen) < 2 else module.net[1:](x.repeat(1, 3, 1, 1)[:, :8, :3, :3])


def predicted_features(module, x):
    return module.net[0](x)


@pytest.mark.parametrize("inference_mode", [True, False], ids=["inference", "no-grad"])
@pytest.mark.parametrize("stage", ["test", "predict", "validate"])
@pytest.mark.parametrize(
    ("step", "words"),
    [
        pytest.param(features_of_an_inner_layer, r"'net\.0' is read by relu", id="read"),
        pytest.param(an_inner_layer_beside_the_forward, r"'net\.0' never reached 'net\.1'", id="leftover"),
        pytest.param(a_branch_not_recorded, r"'net\.1' is given something else", id="branch"),
        pytest.param(predicted_features, r"'net\.0' (is read by|never reached)", id="returned"),
    ],
)
def test_a_step_that_uses_inner_layers_is_refused_and_the_cure_works(stage, step, words, inference_mode):
    class Stepping(Classifier):
        def step(self, batch, batch_idx):
            self.seen.append(type(self.net[1]).__name__)
            return step(self, batch[0])

        validation_step = test_step = predict_step = step

    torch.manual_seed(0)
    module = Stepping()
    before = bits(module)
    with pytest.raises(FoldError, match=words) as caught:
        getattr(trainer(FoldBatchNorm(stages=[stage]), inference_mode=inference_mode), stage)(module, loader())
    caught.match(r"exclude=\['net\.1'\]")
    assert set(module.seen) == {"Identity"}
    module.__dict__.pop("hidden", None)
    assert_same(bits(module), before)
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in module.modules())
    module.seen.clear()
    callback = FoldBatchNorm(stages=[stage], exclude=["net.1"])
    with pytest.warns(UserWarning, match="excluded"):
        getattr(trainer(callback, inference_mode=inference_mode), stage)(module, loader())


def test_a_use_after_the_last_batch_is_refused(module):
    class Late(pl.Callback):
        def on_test_epoch_end(self, trainer, pl_module):
            self.kept = pl_module.net[0](torch.randn(1, 3, 5, 5))

    with pytest.raises(FoldError, match="never reached"):
        trainer(Late(), FoldBatchNorm()).test(module, loader(), verbose=False)
    assert isinstance(module.net[1], nn.BatchNorm2d)


def test_compiled_layers_are_said_to_be_unwatched(module, capsys):
    module.net.compile(backend="eager")
    trainer().test(module, loader(), verbose=False)
    expected, module.outputs = module.outputs, []
    trainer(FoldBatchNorm()).test(module, loader(), verbose=False)
    for found, reference in zip(module.outputs, expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-5)
    assert "Not watched in this stage: 'net.1' (torch.compile runs it)." in capsys.readouterr().out
