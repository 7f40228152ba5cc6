"""What can be folded is folded, and gives the unfolded network's outputs."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bn_lightning import fold_batch_norm, plan_fold

CONVS = {1: (nn.Conv1d, nn.ConvTranspose1d), 2: (nn.Conv2d, nn.ConvTranspose2d), 3: (nn.Conv3d, nn.ConvTranspose3d)}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
AFFINE = {"affine": {}, "plain": {"affine": False}}
if "bias" in inspect.signature(nn.BatchNorm2d).parameters:  # torch ≥ 2.12
    AFFINE["no-bias"] = {"bias": False}


def exact_outputs(model, *inputs):
    """The unfolded network in float64: the reference is torch's own layers."""
    with torch.no_grad():
        return copy.deepcopy(model).double()(*(x.double() for x in inputs))


def assert_folded(model, *inputs, tolerance=1e-5):
    expected = exact_outputs(model, *inputs)
    result = fold_batch_norm(model, inputs)
    assert [row.action for row in result.report.rows] == ["folded-backward"] * len(result.report.rows)
    assert result.report.verified_in == "float64"
    assert result.report.error <= 1e-12
    with torch.no_grad():
        found = result.model(*inputs).double()
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    return result


@pytest.mark.parametrize("dims", [1, 2, 3], ids="{}d".format)
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
@pytest.mark.parametrize("groups", [1, 2, 6], ids="groups={}".format)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "bare"])
@pytest.mark.parametrize("affine", AFFINE.values(), ids=AFFINE.keys())
def test_convolutions(randomize, dims, transposed, groups, bias, affine):
    conv = CONVS[dims][transposed](6, 12, 3, stride=2, padding=1, groups=groups, bias=bias)
    net = randomize(nn.Sequential(conv, NORMS[dims](12, **affine)))
    assert_folded(net, torch.randn(2, 6, *[5] * dims))


@pytest.mark.parametrize("groups", [1, 2, 4], ids="groups={}".format)
def test_transposed_convolution_as_wide_in_as_out(randomize, groups):
    # Axes cannot be told by their size here; torch's own Inductor freezing gets this wrong.
    net = randomize(nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=groups), nn.BatchNorm2d(4)))
    assert_folded(net, torch.randn(2, 4, 5, 5))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "bare"])
@pytest.mark.parametrize("affine", AFFINE.values(), ids=AFFINE.keys())
def test_linear(randomize, bias, affine):
    net = randomize(nn.Sequential(nn.Linear(5, 7, bias=bias), nn.BatchNorm1d(7, **affine)))
    assert_folded(net, torch.randn(4, 5))


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x)) + self.bn(self.conv(x.flip(0)))


class SamePadding(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 2, 0, 2)), self.weight, self.bias)


class Kernel(nn.Module):
    """A weight under another name, in a module that is no convolution."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 6, 3, 3))
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return F.conv2d(x, self.kernel, self.shift)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(6, 4, 3)

    def forward(self, x):
        return self.b(self.a(x)) if x.mean() > -9 else self.bn(x)


class TwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))
        self.norm = self.alias = self.block[1]

    def forward(self, x):
        return self.norm(self.block[0](x)) if x.dim() == 4 else self.block(x)


def buffers_without_tracking():
    bn = nn.BatchNorm2d(4)
    bn.track_running_stats = False
    return bn


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(Siamese, id="shared-pair"),
        pytest.param(lambda: nn.Sequential(SamePadding(6, 4, 3, bias=False), nn.BatchNorm2d(4)), id="conv-subclass"),
        pytest.param(lambda: nn.Sequential(Kernel(), nn.BatchNorm2d(4)), id="weight-of-another-name"),
        pytest.param(Branching, id="control-flow"),
        pytest.param(TwoNames, id="registered-twice"),
        pytest.param(
            lambda: nn.Sequential(nn.Conv2d(6, 4, 3), nn.Dropout(), nn.Identity(), nn.BatchNorm2d(4)),
            id="dropout-between",
        ),
        pytest.param(lambda: nn.Sequential(nn.Conv2d(6, 4, 3), nn.SyncBatchNorm(4)), id="sync"),
        pytest.param(lambda: nn.Sequential(nn.Conv2d(6, 4, 3), buffers_without_tracking()), id="untracked-buffers"),
        pytest.param(
            lambda: nn.Sequential(nn.Conv2d(6, 4, 3, padding=2, padding_mode="reflect"), nn.BatchNorm2d(4)),
            id="reflect",
        ),
        pytest.param(
            lambda: nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)), id="inplace-relu"
        ),
    ],
)
def test_networks_that_others_miss(randomize, images, make):
    net = randomize(make())
    result = assert_folded(net, images)
    assert not [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert result.model is net


def test_a_registered_layer_is_replaced_in_every_place(randomize, images):
    net = randomize(TwoNames())
    names = [name for name, _ in net.named_modules(remove_duplicate=False)]
    fold_batch_norm(net, images)
    assert net.norm is net.alias is net.block[1]
    assert isinstance(net.norm, nn.Identity)
    assert [name for name, _ in net.named_modules(remove_duplicate=False)] == names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_folded_in_float64_and_cast_once(randomize, images, dtype):
    net = randomize(
        nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    )
    net = net.to(dtype)
    bn, before = net[1], net[0].weight.detach().double()
    scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
    expected = (before * scale.view(-1, 1, 1, 1)).to(dtype)
    result = fold_batch_norm(net, images.to(dtype))
    assert torch.equal(net[0].weight, expected)
    assert {parameter.dtype for parameter in net.parameters()} == {dtype}
    assert result.report.native_dtype == str(dtype).removeprefix("torch.")
    assert result.report.error <= 1e-9
    assert 0 < result.report.native_error_after <= 3 * result.report.native_error_before


def test_memory_format_and_trainability_are_kept(randomize, images):
    net = randomize(nn.Sequential(nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4))).to(
        memory_format=torch.channels_last
    )
    net[0].weight.requires_grad_(False)
    weight, memory, stride = net[0].weight, net[0].weight.data_ptr(), net[0].weight.stride()
    fold_batch_norm(net, images)
    assert net[0].weight is weight
    assert (weight.data_ptr(), weight.stride()) == (memory, stride)
    assert isinstance(net[0].bias, nn.Parameter)
    assert not net[0].bias.requires_grad
    assert not net[1].training


def test_several_calls_and_keywords(randomize, images):
    net = randomize(nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)))
    expected = exact_outputs(net, images)
    result = fold_batch_norm(net, [images, {"input": images[:1, :, :5]}])
    assert result.report.rows[0].action == "folded-backward"
    torch.testing.assert_close(net(images).double(), expected, rtol=1e-4, atol=1e-5)


def test_the_plan_changes_nothing_and_says_what_the_fold_does(small_net, images, fingerprint):
    before = fingerprint(small_net)
    plan = plan_fold(small_net, images)
    assert fingerprint(small_net) == before
    assert [(row.name, row.action, row.into, row.reason) for row in plan.rows] == [
        ("1", "folded-backward", "0", ""),
        ("3", "kept", None, "nonlinear_between"),
        ("6", "folded-backward", "5", ""),
    ]
    assert fold_batch_norm(small_net, images).report.rows == plan.rows


def test_wrappers_are_looked_through(small_net, images):
    wrapped = nn.DataParallel(small_net)
    assert fold_batch_norm(wrapped, images).model is small_net
    assert isinstance(small_net[1], nn.Identity)


def test_a_compiled_model_is_looked_through(small_net, images):
    compiled = torch.compile(small_net, backend="eager")
    assert fold_batch_norm(compiled, images).model is small_net


def test_a_compiled_child_takes_the_fold(randomize, images):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    inner = nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    net = randomize(nn.Sequential(torch.compile(inner, backend=backend), nn.Flatten()))
    with torch.no_grad():
        expected = net(images)
        result = fold_batch_norm(net, images)
        assert len(compiled) == 1, "folding runs the child as written"
        assert result.report.verified_in == "float64"
        assert isinstance(inner[1], nn.Identity)
        torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-5)
        result.undo()
        assert torch.equal(net(images), expected)


def test_the_report_reads_well(small_net, images):
    report = fold_batch_norm(small_net, images).report
    lines = str(report).splitlines()
    assert lines[0] == "folded batch norms"
    assert lines[1].split() == ["layer", "action", "into", "weight", "spread", "why", "it", "stays"]
    spreads = [f"{value:.3g}" for value in (report.rows[0].spread_before, report.rows[0].spread_after)]
    assert lines[3].split() == ["1", "folded-backward", "0", spreads[0], "→", spreads[1], "–"]
    why = "nonlinear_between: fed by relu in '2'; read by tanh in '4.0'"
    assert lines[4].split(maxsplit=4) == ["3", "kept", "–", "–", why]
    assert lines[-2].startswith("folded 2 of 3; float64 error ")
    assert lines[-1].startswith("int8: once folded 1 weight spreads more than 32-fold over channels, most of all ")
    assert report.to_dict()["rows"][1]["reason"] == "nonlinear_between"
    assert "<table>" in report._repr_html_()


def test_many_rows_of_one_reason_are_summed_up_in_print_only(randomize):
    class Own(nn.BatchNorm1d):
        def forward(self, x):
            return 2 * super().forward(x)

    body = [layer for _ in range(15) for layer in (nn.Linear(4, 4), Own(4))]
    tail = [layer for _ in range(4) for layer in (nn.ReLU(), nn.BatchNorm1d(4))]
    plan = plan_fold(randomize(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), *body, *tail)), torch.randn(3, 4))
    lines = [" ".join(line.split()) for line in str(plan).splitlines()]
    assert lines[3:8] == [
        f"1 folded-backward 0 {plan.rows[0].spread_before:.3g} → {plan.rows[0].spread_after:.3g} –",
        *(
            f"{index} kept – – subclass: Own has a forward of its own that is not known to be foldable"
            for index in (3, 5, 7)
        ),
        "… and 12 more kept – – subclass: Own has a forward of its own that is not known to be foldable",
    ]
    assert [line.split()[0] for line in lines[8:12]] == ["33", "35", "37", "39"], "four of a kind are told in full"
    assert lines[-1] == "to fold: 1 of 20"
    assert len(plan.rows) == len(plan.to_dict()["rows"]) == 20


def test_a_deep_network_needs_no_deep_recursion(randomize):
    body = [layer for _ in range(700) for layer in (nn.ReLU(), nn.Identity())]
    net = randomize(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), *body, nn.BatchNorm2d(3), nn.Tanh()))
    rows = plan_fold(net, torch.randn(1, 3, 4, 4)).rows
    assert [row.action for row in rows] == ["folded-backward", "kept"]
