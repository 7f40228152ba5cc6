"""The record names makers and readers by executing, and leaves the model as it was."""

import gc
import subprocess
import sys
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from bn_lightning import record_forward
from bn_lightning.errors import BatchNormError, FoldError


class Net(nn.Module):
    """A conv whose output goes through `body`, a function of (self, conv output)."""

    def __init__(self, body):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.body = body

    def forward(self, x):
        return self.body(self, self.conv(x))


def conv_output(body):
    """Record a net, return its record and the value the convolution made."""
    record = record_forward(Net(body).eval(), torch.randn(2, 3, 6, 6))
    return record, record.values[record.of_kind("conv")[0].outputs[0]]


def reader_names(record, value):
    return [operation.function for operation in record.readers(value.index)]


def keep(net, y):
    net.cache = y
    return net.bn(y)


def keep_under_a_reused_id(net, y):
    clones = [y.clone() for _ in range(100)]
    ids = {id(clone) for clone in clones}
    del clones
    # A loop until an id comes again may never end, and fills the memory.
    net.cache = [y.clone() for _ in range(100)]
    assert ids & {id(clone) for clone in net.cache}
    return net.bn(y)


def keep_in_cycle(net, y):
    cycle = [y]
    cycle.append(cycle)
    return net.bn(y)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        pytest.param(lambda net, y: net.bn(y), ["batch_norm"], id="one"),
        pytest.param(lambda net, y: net.bn(input=y), ["batch_norm"], id="keyword"),
        pytest.param(lambda net, y: net.bn(y) + y, ["batch_norm", "add"], id="residual"),
        pytest.param(lambda net, y: torch.cat([net.bn(y), y]), ["batch_norm", "cat"], id="nested-argument"),
        pytest.param(lambda net, y: net.bn(y) * y.mean().item(), ["batch_norm", "mean"], id="item"),
        pytest.param(lambda net, y: net.bn(y) if y.max() > -1e9 else y, ["max", "batch_norm"], id="control-flow"),
        pytest.param(lambda net, y: (y.tolist(), net.bn(y))[1], ["tolist", "batch_norm"], id="to-python"),
        pytest.param(lambda net, y: (y.data, net.bn(y))[1], ["data", "batch_norm"], id="data"),
        pytest.param(lambda net, y: (y.type(torch.float64), net.bn(y))[1], ["type", "batch_norm"], id="cast"),
        pytest.param(
            lambda net, y: net.bn(y)[: y.shape[0], : y.size(1)].reshape_as(y).to(y.dtype),
            ["batch_norm"],
            id="metadata-is-no-reader",
        ),
        pytest.param(lambda net, y: net.bn(F.dropout(y, training=False).contiguous()), ["batch_norm"], id="same-value"),
    ],
)
def test_every_reader_is_named(body, expected):
    record, value = conv_output(body)
    assert reader_names(record, value) == expected
    assert record.producer(value.index).module == "conv"
    assert not value.output
    assert not value.escaped
    assert not value.unseen


def test_a_reused_id_is_no_stale_value():
    record, _ = conv_output(keep_under_a_reused_id)
    escaped = [record.producer(value.index).index for value in record.values if value.escaped]
    clones = [operation.index for operation in record.operations if operation.function == "clone"]
    assert len(clones) == 200
    assert escaped == clones[100:]


@pytest.mark.parametrize("inference", [True, False], ids=["inference", "plain"])
def test_an_operation_in_place_makes_a_new_value_of_the_same_tensor(inference):
    with torch.inference_mode(inference):  # where tensors carry no version
        record, value = conv_output(lambda net, y: net.bn(F.relu(y, inplace=True)))
    assert reader_names(record, value) == ["relu"]
    fed = record.of_kind("batch_norm")[0].layer.input
    assert record.producer(fed).function == "relu"


def test_a_change_through_a_view_leaves_no_known_producer():
    def body(net, y):
        y[:, :1].zero_()
        return net.bn(y)

    record, _ = conv_output(body)
    assert record.producer(record.of_kind("batch_norm")[0].layer.input) is None


@pytest.mark.parametrize(
    ("body", "output", "escaped"),
    [
        pytest.param(lambda net, y: {"deep": [(net.bn(y), y)]}, True, False, id="nested-output"),
        pytest.param(keep, False, True, id="kept-on-the-module"),
        pytest.param(keep_in_cycle, False, False, id="kept-by-a-cycle-only"),
    ],
)
def test_how_a_value_ends(body, output, escaped):
    _, value = conv_output(body)
    assert (value.output, value.escaped) == (output, escaped)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecated, and all the same in many a deployed network
    SCRIPTED = torch.jit.script(nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1)).eval())


class Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x


@pytest.mark.parametrize(
    ("body", "kernel"),
    [
        pytest.param(lambda net, y: net.bn(y) + SCRIPTED(y), "aten.relu", id="torchscript"),
        pytest.param(lambda net, y: net.bn(y) + torch.vmap(lambda row: row.sigmoid())(y), "aten.sigmoid", id="vmap"),
    ],
)
def test_code_beneath_the_recorder_is_noticed(body, kernel):
    _, value = conv_output(body)
    assert any(kernel in name for name in value.unseen)


def test_what_an_autograd_function_reads_is_no_secret():
    record, value = conv_output(lambda net, y: net.bn(y) + Through.apply(y))
    assert reader_names(record, value) == ["batch_norm", "view_as"]


def test_layers_are_known_by_their_tensors_not_by_their_modules():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))
            self.norm = nn.BatchNorm2d(4, eps=0.25)
            self.tied = nn.Conv2d(3, 4, 3)
            self.tied.weight = self.kernel

        def forward(self, x):
            y = F.conv2d(x, self.kernel, None, 1, 0, 1, 1)
            y = F.batch_norm(y, self.norm.running_mean, self.norm.running_var, eps=0.25)
            return y + self.norm.weight.sum() + F.conv2d(x, 2 * self.tied.weight)

    record = record_forward(Functional().eval(), torch.randn(1, 3, 5, 5))
    first, second = record.of_kind("conv")
    assert first.layer.tensors == {"weight": ("kernel", "tied.weight"), "bias": None}
    assert first.layer.owners("weight") == ("", "tied")
    assert second.layer.tensors["weight"] == ()
    (norm,) = record.of_kind("batch_norm")
    assert norm.layer.owners("running_mean") == ("norm",)
    assert (norm.layer.eps, norm.layer.training, norm.module) == (0.25, False, "")
    assert [operation.function for operation in record.tensor_readers("norm.weight")] == ["sum"]
    assert [operation.function for operation in record.tensor_readers("kernel")] == ["conv2d", "mul"]


def test_several_calls_are_one_record():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    record = record_forward(
        net, [torch.randn(1, 3, 5, 5), (torch.randn(2, 3, 7, 7),), {"input": torch.randn(3, 3, 4, 4)}]
    )
    assert [operation.call for operation in record.operations] == [0, 0, 1, 1, 2, 2]
    assert [record.values[operation.outputs[0]].shape[0] for operation in record.of_kind("conv")] == [1, 2, 3]


def test_it_works_inside_inference_mode_and_holds_no_activation():
    made = []

    def remember(net, y):
        made.append(weakref.ref(y))
        return net.bn(y)

    with torch.inference_mode():
        record = record_forward(Net(remember).eval(), torch.randn(2, 3, 6, 6))
    gc.collect()
    assert made[0]() is None
    assert [operation.kind for operation in record.operations] == ["conv", "batch_norm"]


def test_model_inputs_and_hooks_are_given_back_even_after_an_error():
    def fails(net, y):
        net.bn.train()(y)
        y.mul_(2)
        raise RuntimeError("boom")

    net, x = Net(fails).eval(), torch.randn(2, 3, 6, 6)
    state, given = {key: value.clone() for key, value in net.state_dict().items()}, x.clone()
    with pytest.raises(BatchNormError, match="boom"):
        record_forward(net, x)
    assert not net.bn.training
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert torch.equal(x, given)
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks


def test_a_written_input_is_the_copy():
    net, x = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 1)).eval(), -torch.ones(1, 3, 2, 2)
    record_forward(net, x)
    assert torch.equal(x, -torch.ones(1, 3, 2, 2))


def test_the_printed_record_is_a_table():
    record, _ = conv_output(lambda net, y: (net.bn(y), y))
    lines = str(record).splitlines()
    assert lines[0] == "2 operations in 1 forward pass"
    assert lines[3].split() == ["0", "conv2d", "conv", "v0", "v1", "2×4×4×4", "output"]
    assert "<table>" in record._repr_html_()


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        pytest.param(
            torch.randn(2, 5, 6, 6),
            [r"float32\[2, 5, 6, 6\]\), 'conv' \(Conv2d\) raised RuntimeError", "expected input", r"Net\.forward"],
            id="width",
        ),
        pytest.param(DataLoader([0]), [r"is a DataLoader.*next\(iter\(loader\)\)"], id="loader"),
        pytest.param((torch.ones(1), 3), [r"\(float32\[1\], 3\)", "positional arguments"], id="too-many"),
        pytest.param({"y": torch.ones(1)}, [r"y=float32\[1\]", "unexpected keyword"], id="keyword"),
        pytest.param([], ["empty list"], id="empty"),
        pytest.param("image.png", ["takes a tensor", "'image.png'"], id="text"),
        pytest.param([[torch.ones(1)]], ["takes a tensor", r"\[float32\[1\]\]"], id="list-in-list"),
        pytest.param(torch.ones(2).numpy(), ["takes a tensor", "numpy.ndarray of shape"], id="numpy"),
    ],
)
def test_inputs_that_do_not_fit_are_named(inputs, words):
    with pytest.raises(FoldError) as caught:
        record_forward(Net(lambda net, y: y).eval(), inputs, error=FoldError)
    for word in words:
        caught.match(word)


def test_the_models_own_error_is_chained():
    with pytest.raises(BatchNormError) as caught:
        record_forward(Net(lambda net, y: y).eval(), torch.randn(2, 5, 6, 6))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_recording_imports_no_compiler():
    """Dynamo and sympy take seconds, and nothing here is compiled."""
    code = (
        "import sys, torch, bn_lightning\n"
        "net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).eval()\n"
        "bn_lightning.fold_batch_norm(net, torch.randn(3, 2))\n"
        "print([name for name in ('torch._dynamo', 'sympy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_is_no_module_is_refused():
    with pytest.raises(BatchNormError, match=r"expected a torch\.nn\.Module.*Tensor"):
        record_forward(torch.ones(2, 2), nn.BatchNorm1d(2))


def scripted_reader(net, y):
    return net.bn(y) + SCRIPTED(y)


def lent_weights(net, y):
    weights = {name: 2 * value for name, value in net.conv.named_parameters()}
    return net.bn(y) + torch.func.functional_call(net.conv, weights, (y[:, :3],)).mean()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        pytest.param(scripted_reader, "the output of conv2d in 'conv', is read by aten.relu", id="torchscript"),
        pytest.param(keep, "the output of conv2d in 'conv', is kept somewhere", id="escapes"),
        pytest.param(
            lambda net, y: net.bn(y) if y.mean() > 0 and int(y.sum()) < 1e9 else y.relu(),
            "Python reads a value (bool",
            id="control-flow",
        ),
        pytest.param(lambda net, y: net.bn(y.float()) * y.max().item(), "Python reads a value (item)", id="item"),
        pytest.param(
            lent_weights, "conv2d in 'conv' is given a weight that is computed or lent", id="functional-weights"
        ),
    ],
)
def test_what_could_not_be_seen_is_said(body, words):
    record, _ = conv_output(body)
    assert any(words in spot for spot in record.blind_spots), record.blind_spots
    assert record.blind_spots[0] in str(record)


def test_nothing_is_said_where_everything_was_seen():
    record, _ = conv_output(lambda net, y: net.bn(y))
    assert record.blind_spots == ()


def test_control_flow_that_differs_between_calls_is_said():
    net = Net(lambda net, y: net.bn(y) if len(y) > 1 else net.bn(y.relu())).eval()
    many, one = torch.randn(2, 3, 6, 6), torch.randn(1, 3, 6, 6)
    assert record_forward(net, [many, many]).blind_spots == ()
    (spot,) = record_forward(net, [many, one]).blind_spots
    assert spot == (
        "Control flow differs between example calls: where the first runs batch_norm in 'bn', call 2 runs relu."
    )


def test_module_calls_tell_who_called_whom_with_what():
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), nn.ReLU(inplace=True)).eval()
    record = record_forward(net, torch.randn(1, 3, 5, 5))
    calls = record.module_calls
    assert [(call.module, call.parent, call.first, call.end) for call in calls] == [
        ("", None, 0, 3),
        ("0", 0, 0, 2),
        ("0.0", 1, 0, 1),
        ("0.1", 1, 1, 2),
        ("1", 0, 2, 3),
    ]
    conv, norm, relu = record.operations
    assert (calls[2].inputs, calls[2].outputs) == (conv.inputs, conv.outputs)
    assert calls[1].outputs == norm.outputs == calls[4].inputs
    assert calls[0].outputs == relu.outputs != norm.outputs


def test_memory_that_was_freed_is_another_value_s():
    """The allocator gives the same place again."""

    class Freeing(nn.Module):
        def forward(self, x):
            for _ in range(8):
                x = (x * 2) + x
            return x

    record = record_forward(Freeing(), torch.ones(1, 3, 64, 64))
    memories = [record.values[operation.outputs[0]].memory for operation in record.operations]
    assert len(set(memories)) == len(memories) == 16


def test_views_share_a_memory():
    class Views(nn.Module):
        def forward(self, x):
            y = x + 1
            return y.flatten(1)[:, 2:].mul_(2) + y.transpose(1, 2).sum()

    record = record_forward(Views(), torch.ones(1, 3, 4, 4))
    memory = {operation.function: record.values[operation.outputs[0]].memory for operation in record.operations[:5]}
    assert len({memory[name] for name in ("add", "flatten", "getitem", "mul_", "transpose")}) == 1
    (writing,) = [operation for operation in record.operations if operation.overwrites]
    assert (writing.function, writing.overwrites) == ("mul_", (memory["add"],))


def test_parameters_are_no_values():
    class Adding(nn.Module):
        def __init__(self):
            super().__init__()
            self.row = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return torch.cat([x + self.row, self.row[None]])

    record = record_forward(Adding(), torch.ones(1, 4))
    assert len(record.values) == 4
    assert [operation.passing for operation in record.operations[:2]] == [None, None]


DROPOUTS = {
    "function": lambda net, y: F.dropout(y, 0.25, net.training),
    "in-place": lambda net, y: F.dropout(y, p=0.25, training=net.training, inplace=True),
    "torch": lambda net, y: torch.dropout(y, 0.25, net.training),
    "channels": lambda net, y: F.dropout2d(y, 0.25, net.training),
    "alpha": lambda net, y: F.alpha_dropout(y, 0.25, net.training),
    "module": lambda net, y: net.drop(y),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("way", DROPOUTS)
def test_every_dropout_is_noted_also_where_it_gives_back_its_input(way, training):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.drop = nn.Conv2d(3, 3, 1), nn.Dropout(0.25)

        def forward(self, x):
            return self.conv(F.relu(DROPOUTS[way](self, self.conv(x))))

    record = record_forward(Net().train(training), [torch.zeros(2, 3, 4, 4)] * 2)
    first, second = record.dropouts
    assert (first.p, first.call, second.call) == (0.25, 0, 1)
    assert first.function.rstrip("_") == {"channels": "dropout2d", "alpha": "alpha_dropout"}.get(way, "dropout")
    assert first.module == ("drop" if way == "module" else "")
    # Independently: between the first convolution and relu.
    conv, relu = record.operations[0], next(each for each in record.operations if each.function == "relu")
    assert first.input == conv.outputs[0]
    assert (first.output,) == relu.inputs
    assert first.end == relu.index
    assert (first.output == first.input) == (not training)
    assert [each.function for each in record.operations if each.call == 0].count("dropout") <= 1
    assert record.of_calls(1).dropouts == (first,)
