"""A fold that does not verify is taken back, by its row; the numbers in the report are what was measured."""

import copy
import math
from dataclasses import InitVar, dataclass, field

import pytest
import torch
from torch import nn

from bn_lightning import fold_batch_norm
from bn_lightning.errors import FoldError
from bn_lightning.folding.agreement import measure_agreement
from bn_lightning.folding.numbers import Numbers
from bn_lightning.folding.verify import comparison_problem, relative_error


@pytest.fixture
def get_wrong(monkeypatch):
    """Get the bias wrong that folding some layer gives."""

    def get(layer, by):
        right = Numbers.apply

        def wrong(numbers, step):
            kept = right(numbers, step)
            if step.name == layer and kept is None:
                numbers.changed[step.targets[0].bias] += by
            return kept

        monkeypatch.setattr(Numbers, "apply", wrong)

    return get


@pytest.fixture
def wrong_fold(get_wrong):
    get_wrong("1", 1e-6)


def test_the_guilty_fold_is_found_and_taken_back(small_net, images, wrong_fold):
    reference = copy.deepcopy(small_net).double()(images.double())
    report = fold_batch_norm(small_net, images).report
    assert [(row.name, row.action, row.reason) for row in report.rows] == [
        ("1", "kept", "unverified"),
        ("3", "kept", "nonlinear_between"),
        ("6", "folded-backward", ""),
    ]
    assert "differ by" in report.rows[0].detail
    assert isinstance(small_net[1], nn.BatchNorm2d)
    assert small_net[0].bias is None
    assert report.error <= 1e-9
    torch.testing.assert_close(small_net(images).double(), reference, rtol=1e-5, atol=1e-6)


class Multiplied(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = [torch.randn(5, 5)]  # neither parameter nor buffer: it does not run in float64

    def forward(self, x):
        return x @ self.matrix[0]


@pytest.mark.parametrize("native", [False, True], ids=["float64", "native"])
def test_what_stands_behind_a_fold_that_is_taken_back_goes_back_too(randomize, images, get_wrong, native):
    layers = [
        nn.Conv2d(6, 4, 3),
        *(nn.BatchNorm2d(4) for _ in range(3)),
        nn.ReLU(),
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4),
    ]
    net = randomize(nn.Sequential(*layers, *([Multiplied()] if native else [])))
    expected = net(images)
    get_wrong("1", 0.1)
    rows = {row.name: row for row in fold_batch_norm(net, images).report.rows}
    assert [rows[name].reason for name in ("1", "2", "3", "6")] == ["unverified", "unverified", "unverified", ""]
    assert "differ by" in rows["1"].detail
    assert rows["2"].detail == rows["3"].detail == "it stands behind '1', which could not be folded"
    torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-5)


class Reaching(nn.Module):
    """Reads a setting of the layer that folding removes."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x)) * self.bn.eps


def test_a_model_that_needs_the_layer_keeps_it(randomize, images):
    net = randomize(Reaching())
    (row,) = fold_batch_norm(net, images).report.rows
    assert row.reason == "unverified"
    assert "'Identity' object has no attribute 'eps'" in row.detail
    assert "Pass a tensor" not in row.detail
    assert isinstance(net.bn, nn.BatchNorm2d)


class Ending(nn.Module):
    def __init__(self, end):
        super().__init__()
        self.conv, self.bn, self.end = nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), end

    def forward(self, x):
        return self.end(self.bn(self.conv(x)))


COUNTER = iter(range(10**6))


@pytest.mark.parametrize(
    ("end", "words"),
    [
        pytest.param(lambda y: y.argmax(1), "no floating-point values", id="integers"),
        pytest.param(lambda y: y[:0], "no floating-point values", id="empty"),
        pytest.param(lambda y: (), "no floating-point values", id="nothing"),
        pytest.param(lambda y: y * 0, "zero throughout", id="zeros"),
        pytest.param(lambda y: {"a": y / 0, "b": y * float("nan")}, "nan or inf throughout", id="infinite"),
        pytest.param(lambda y: y + next(COUNTER), "changes from run to run", id="nondeterministic"),
    ],
)
def test_a_comparison_that_proves_nothing_fails(randomize, images, end, words):
    net = randomize(Ending(end))
    report = fold_batch_norm(net, images).report
    assert (report.rows[0].reason, report.verified_in) == ("unverified", "nothing folded")
    assert words in report.rows[0].detail
    assert report.summary == "folded 0 of 1", "no errors of a fold that is none"
    assert (report.native_error_before, report.native_error_after) == (None, None)
    assert isinstance(net.bn, nn.BatchNorm2d)


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(lambda y: y.masked_fill(y.argmax(1, keepdim=True) == 0, float("-inf")), id="masked"),
        pytest.param(lambda y: {"a": y, "b": y / 0, "c": y.detach() * float("nan")}, id="beside-finite-ones"),
    ],
)
def test_infinities_have_to_stand_in_the_same_places(randomize, images, end):
    report = fold_batch_norm(randomize(Ending(end)), images).report
    assert (report.rows[0].action, report.verified_in) == ("folded-backward", "float64")


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([1.0, float("inf")], 0.0),
        ([1.5, float("inf")], 0.5),
        ([1.0, float("-inf")], float("inf")),
        ([1.0, 2.0], float("inf")),
        ([float("inf"), float("inf")], float("inf")),
        ([float("nan"), float("inf")], float("inf")),
    ],
)
def test_the_error_beside_an_infinity(found, expected):
    assert relative_error([torch.tensor(found)], [torch.tensor([1.0, float("inf")])]) == expected


@dataclass
class Batch:
    images: torch.Tensor
    labels: torch.Tensor
    name: str = "batch"


@dataclass(frozen=True)
class Prepared:
    images: torch.Tensor = field(init=False)
    labels: torch.Tensor
    name: str = "batch"
    scale: InitVar[float] = None

    def __post_init__(self, scale):
        object.__setattr__(self, "images", scale * torch.randn(2, 6, 5, 5))


class Attributes(dict):
    __getattr__ = dict.__getitem__


INPUTS = {
    "dataclass": lambda: Batch(torch.randn(2, 6, 5, 5), torch.tensor([1, 2])),
    "dataclass-with-a-constructor-of-its-own": lambda: Prepared(torch.tensor([1, 2]), scale=2.0),
    "mapping-with-attributes": lambda: Attributes(
        images=torch.randn(2, 6, 5, 5), labels=torch.tensor([1, 2]), name="batch"
    ),
}


@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS.keys())
def test_inputs_in_containers_keep_their_class_and_are_cast(randomize, make):
    class Net(Ending):
        def forward(self, batch, size):
            assert (batch.name, type(size)) == ("batch", torch.Size)
            return super().forward(batch.images) * batch.labels.sum()

    given = make()
    before = given.images.clone()
    report = fold_batch_norm(randomize(Net(lambda y: y)), (given, torch.Size([5]))).report
    assert (report.rows[0].action, report.verified_in) == ("folded-backward", "float64")
    assert torch.equal(given.images, before)


def test_sparse_inputs_are_taken(randomize):
    class Net(nn.Sequential):
        def forward(self, x):
            return super().forward(x.to_dense())

    net = randomize(Net(nn.Linear(6, 4), nn.BatchNorm1d(4)))
    report = fold_batch_norm(net, torch.randn(3, 6).to_sparse()).report
    assert report.rows[0].action == "folded-backward"


def test_nested_outputs_are_all_compared(randomize, images, wrong_fold):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fine = nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))
            self.add_module("0", nn.Conv2d(6, 4, 3))
            self.add_module("1", nn.BatchNorm2d(4))

        def forward(self, x):
            return {"fine": self.fine(x), "deep": [(x.argmax(), get(self, "1")(get(self, "0")(x)))]}

    def get(module, name):
        return module.get_submodule(name)

    rows = {row.name: row.reason for row in fold_batch_norm(randomize(Two()), images).report.rows}
    assert rows == {"fine.1": "", "1": "unverified"}


class CastsItsInput(Ending):
    def __init__(self):
        super().__init__(lambda y: y.to(torch.float32) @ y.new_ones(5, 5, dtype=torch.float32))

    def forward(self, x):
        return super().forward(x.float())


class NeedsFloat32(Ending):
    def __init__(self):
        matrix = torch.randn(5, 5)  # neither parameter nor buffer
        super().__init__(lambda y: y @ matrix)


def test_casts_to_float32_inside_do_not_spoil_the_float64_comparison(randomize, images):
    report = fold_batch_norm(randomize(CastsItsInput()), images).report
    assert (report.verified_in, report.rows[0].action) == ("float64", "folded-backward")
    assert report.error <= 1e-12


def test_a_model_that_cannot_run_in_float64_is_verified_in_its_own_dtype(randomize, images):
    report = fold_batch_norm(randomize(NeedsFloat32()), images).report
    assert (report.verified_in, report.rows[0].action) == ("float32", "folded-backward")
    assert 0 < report.error <= 1e-5 < report.tolerance < 1e-3
    assert report.native_error_before is None
    assert "cannot run in float64 (RuntimeError: expected" in str(report)


def test_a_wrong_fold_is_found_without_float64_too(randomize, images, get_wrong):
    get_wrong("bn", 0.01)
    report = fold_batch_norm(randomize(NeedsFloat32()), images).report
    assert report.rows[0].reason == "unverified"
    assert "in float32" in report.rows[0].detail


def test_a_fold_that_ruins_the_native_dtype_is_taken_back(randomize, images):
    """In float16 a weight of 1e-9 is zero: right in float64, useless in the network's own dtype."""
    net = randomize(nn.Sequential(nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4)))
    with torch.no_grad():
        net[0].weight.mul_(1e-2)
        net[1].weight.fill_(1e-6)
        net[1].bias.fill_(0.0)
        net[1].running_mean.fill_(0.0)
    net.half()
    with torch.no_grad():
        net[1].weight.fill_(1e-6)
    (row,) = fold_batch_norm(net, images.half() * 1e3).report.rows
    assert row.reason == "unverified"
    assert "in float16" in row.detail
    assert isinstance(net[1], nn.BatchNorm2d)


def test_the_reported_errors_are_the_measured_ones(small_net, images):
    unfolded = copy.deepcopy(small_net)
    exact = copy.deepcopy(small_net).double()(images.double())
    report = fold_batch_norm(small_net, images).report
    for network, reported in ((unfolded, report.native_error_before), (small_net, report.native_error_after)):
        measured = ((network(images).double() - exact).abs().max() / exact.abs().max()).item()
        assert measured == pytest.approx(reported, rel=0.2)
    assert report.native_dtype == "float32"
    assert report.error < 1e-12 < report.native_error_after


@pytest.mark.parametrize(
    ("found", "reference", "error"),
    [
        pytest.param([[1.0, 3.0], [1.0]], [[1.0, 4.0], [1.0]], 0.25, id="largest"),
        pytest.param([[1.0], [0.5]], [[1.0], [1.0]], 0.5, id="second"),
        pytest.param([[0.0]], [[0.0]], 0.0, id="both-zero"),
        pytest.param([[1e-30]], [[0.0]], math.inf, id="against-zero"),
        pytest.param([[math.nan]], [[1.0]], math.inf, id="nan"),
        pytest.param([[1.0, 1.0]], [[1.0]], math.inf, id="shape"),
        pytest.param([], [[1.0]], math.inf, id="missing"),
        pytest.param([[]], [[]], math.inf, id="empty"),
    ],
)
def test_relative_error(found, reference, error):
    assert relative_error([torch.tensor(x) for x in found], [torch.tensor(x) for x in reference]) == error


def test_a_fit_reference_has_no_problem():
    assert comparison_problem([torch.zeros(2), torch.tensor([1.0])]) is None


def test_batches_whose_output_is_nonfinite_are_refused(randomize, images):
    net = randomize(nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)))
    with pytest.raises(FoldError, match="nan or inf throughout"):
        fold_batch_norm(net, images, batches=[images, images * float("nan")])
    assert isinstance(net[1], nn.BatchNorm2d)
    apart = measure_agreement(lambda x: (x, x * float("nan")), [images])
    assert apart.largest_difference == float("inf")
    masked = images.masked_fill(images > 1, float("-inf"))
    agreement = measure_agreement(lambda x: (x, x + 0.5), [masked])
    assert agreement.largest_difference == pytest.approx(0.5)
    assert agreement.largest_output == masked[masked.isfinite()].abs().max()
