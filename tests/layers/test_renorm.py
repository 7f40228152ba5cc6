"""BatchRenorm against float64 NumPy and a written-out detach, its schedule, and statistics without a count."""

import copy

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bn_lightning.errors import ConversionError
from bn_lightning.functional.renorm import ramp, renorm_correction
from bn_lightning.layers import BatchRenorm
from bn_lightning.layers import renorm_schedule as module

AT_ONCE = {"r_warmup": None, "d_warmup": None}
AFFINE = [pytest.param(kind, id=str(kind)) for kind in (True, "scale", "shift", False)]
LIMITS = [
    pytest.param(1.0, 0.0, id="plain"),
    pytest.param(1.1, 0.1, id="clipped"),
    pytest.param(1.5, 5.0, id="r-clipped"),
    pytest.param(50.0, 0.2, id="d-clipped"),
    pytest.param(50.0, 50.0, id="free"),
]


def randomized(layer, seed=0):
    """No fresh layer: scale 1, shift 0, mean 0 and variance 1 hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator, dtype=torch.float64) + 0.5)
        layer.running_mean.copy_(torch.randn(layer.num_features, generator=generator, dtype=torch.float64))
        layer.running_var.copy_(torch.rand(layer.num_features, generator=generator, dtype=torch.float64) * 4 + 0.3)
    return layer


def data(*shape, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    channels = torch.arange(shape[1], dtype=torch.float64).view(1, -1, *[1] * (len(shape) - 2))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * (1 + channels) + channels).to(dtype)


def numpy_parameters(layer):
    return [None if p is None else p.detach().double().numpy() for p in (layer.weight, layer.bias)]


def close(actual, expected, **tolerances):
    torch.testing.assert_close(actual.detach().double(), torch.as_tensor(expected), **tolerances)


@pytest.mark.parametrize(("r_max", "d_max"), LIMITS)
@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("shape", [(7, 3), (5, 3, 4), (4, 3, 2, 5)], ids=str)
def test_matches_the_reference_over_several_steps(shape, affine, r_max, d_max):
    layer = randomized(BatchRenorm(3, momentum=0.3, affine=affine, r_max=r_max, d_max=d_max, **AT_ONCE).double())
    mean, var = layer.running_mean.numpy().copy(), layer.running_var.numpy().copy()
    for step in range(3):
        x = data(*shape, seed=step)
        expected = reference.batch_renorm(x.numpy(), mean, var, r_max, d_max, *numpy_parameters(layer), layer.eps)
        close(layer(x), expected.y)
        mean, var = reference.moved(mean, expected.mean, 0.3), reference.moved(var, expected.var, 0.3)
        close(layer.running_mean, mean)
        close(layer.running_var, var)
        assert int(layer.num_batches_tracked) == step + 1
    x = data(*shape, seed=9)
    close(layer.eval()(x), reference.standardize(x.numpy(), mean, var, *numpy_parameters(layer), layer.eps))


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    examples=st.integers(2, 9),
    rest=st.lists(st.integers(1, 4), max_size=3),
    affine=st.sampled_from([True, "scale", "shift", False]),
    r_max=st.floats(1, 10),
    d_max=st.floats(0, 10),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_matches_the_reference_for_any_shape(examples, rest, affine, r_max, d_max, dtype):
    layer = randomized(BatchRenorm(3, affine=affine, r_max=r_max, d_max=d_max, **AT_ONCE))
    layer = layer.double() if dtype == torch.float64 else layer
    x = data(examples, 3, *rest, dtype=dtype)
    arguments = [v.double().numpy().copy() for v in (x, layer.running_mean, layer.running_var)]
    expected = reference.batch_renorm(*arguments, r_max, d_max, *numpy_parameters(layer), layer.eps)
    y = layer(x)
    assert y.dtype == dtype
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    close(y, expected.y, rtol=tolerance, atol=tolerance)
    # Statistics are taken in float32 whatever the input.
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    close(layer.running_var, reference.moved(arguments[2], expected.var, 0.1), rtol=tolerance, atol=tolerance)


def written_out(layer, x, r_max, d_max):
    """Alg. 1 in tensor operations, with the paper's stop_gradient as detach."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    sigma = (var + layer.eps).sqrt()
    running_mean, running_var = (v.clone().view_as(mean) for v in (layer.running_mean, layer.running_var))
    running_sigma = (running_var + layer.eps).sqrt()
    r = (sigma / running_sigma).clamp(1 / r_max, r_max).detach()
    d = ((mean - running_mean) / running_sigma).clamp(-d_max, d_max).detach()
    y = (x - mean) / sigma * r + d
    y = y if layer.weight is None else y * layer.weight.view_as(mean)
    return y if layer.bias is None else y + layer.bias.view_as(mean)


@pytest.mark.parametrize(("r_max", "d_max"), LIMITS)
@pytest.mark.parametrize("affine", AFFINE)
def test_gradients_equal_those_of_a_written_out_detach(affine, r_max, d_max):
    layer = randomized(BatchRenorm(3, affine=affine, r_max=r_max, d_max=d_max, **AT_ONCE).double())
    x = data(4, 3, 2, 5).requires_grad_()
    leaves = [x, *layer.parameters()]
    upstream = data(4, 3, 2, 5, seed=5)
    expected = torch.autograd.grad(written_out(layer, x, r_max, d_max), leaves, upstream)
    actual = torch.autograd.grad(layer(x), leaves, upstream)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("affine", AFFINE)
def test_gradcheck_with_the_correction_held_fixed(affine, monkeypatch):
    layer = randomized(BatchRenorm(2, affine=affine, r_max=50.0, d_max=50.0, **AT_ONCE).double())
    layer.track_running_stats = False
    x = data(4, 2, 3).requires_grad_()
    fixed = torch.tensor([0.7, 1.9]).double(), torch.tensor([-0.4, 2.2]).double()
    monkeypatch.setattr(module, "renorm_correction", lambda *_: fixed)
    names = [name for name, _ in layer.named_parameters()]

    def function(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *layer.parameters()))


def test_wide_limits_normalize_as_evaluation_does():
    layer = randomized(BatchRenorm(3, r_max=1e6, d_max=1e6, **AT_ONCE).double())
    x = data(6, 3, 4)
    expected = copy.deepcopy(layer).eval()(x)
    close(layer(x), expected.detach())


def test_keeps_nothing_of_the_inputs_size_but_the_input():
    layer = randomized(BatchRenorm(3, **AT_ONCE))
    x = data(4, 3, 5, 5, dtype=torch.float32).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert {t.data_ptr() for t in saved if t.numel() >= x.numel()} == {x.data_ptr()}


def test_default_schedule_is_the_papers():
    layer = BatchRenorm(2)
    for count in (0, 1, 4_999, 5_000, 5_001, 13_000, 25_000, 25_001, 39_999, 40_000, 10_000_000):
        layer.num_batches_tracked.fill_(count)
        r_max, d_max = layer.current_limits()
        close(r_max, np.interp(count, [5_000, 40_000], [1.0, 3.0]), rtol=1e-6, atol=1e-6)
        close(d_max, np.interp(count, [5_000, 25_000], [0.0, 5.0]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("period", "expected"),
    [
        pytest.param((2, 4), [1, 1, 1, 2, 3, 3], id="line"),
        pytest.param((3, 3), [1, 1, 1, 3, 3, 3], id="jump"),
        pytest.param((0, 0), [3] * 6, id="jump-at-once"),
        pytest.param(None, [3] * 6, id="none"),
    ],
)
def test_ramp(period, expected):
    assert ramp(torch.arange(6), 1.0, 3.0, period).tolist() == expected


def test_ramp_ends_exactly_at_the_limit():
    for last in (2.7, 1.1, 3.3):
        assert float(ramp(torch.tensor(40_001.0).double(), 1.0, last, (5, 40_000))) == last


def test_limits_are_those_before_the_step_counts():
    """The paper's first 5,000 steps are plain: step number 5,000 (from 0) is the first that may not be."""
    layer = randomized(BatchRenorm(3, r_warmup=(2, 2), d_warmup=(2, 2)).double())
    x = data(5, 3)
    for plain in (True, True, False):
        expected = nn.functional.batch_norm(x, None, None, layer.weight, layer.bias, True, 0.0, layer.eps)
        assert torch.allclose(layer(x), expected) is plain


def test_resumes_within_the_schedule():
    options = {"momentum": 0.2, "r_warmup": (1, 6), "d_warmup": (2, 8)}
    whole, second = randomized(BatchRenorm(3, **options)), BatchRenorm(3, **options)
    batches = [data(6, 3, 4, seed=seed, dtype=torch.float32) for seed in range(10)]
    for x in batches[:5]:
        whole(x)
    second.load_state_dict(whole.state_dict())
    for x in batches[5:]:
        assert torch.equal(whole(x), second(x))
    assert all(torch.equal(one, other) for one, other in zip(whole.buffers(), second.buffers(), strict=True))


def without_count(state):
    """As torch 0.4 wrote it: the metadata, which hold the version, go too."""
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("kind", ["old-version", "not-strict", "zero"])
def test_a_file_with_statistics_but_no_count_means_converged(kind, assign):
    source = randomized(nn.BatchNorm2d(3))
    state = nn.Sequential(source).state_dict()
    if kind == "old-version":
        state = without_count(state)
    elif kind == "not-strict":
        del state["0.num_batches_tracked"]
    layer = BatchRenorm(3)
    nn.Sequential(layer).load_state_dict(state, strict=kind != "not-strict", assign=assign)
    assert int(layer.num_batches_tracked) == 40_000
    assert int(source.num_batches_tracked) == 0, "the file's own tensor"
    assert int(layer.state_dict()["num_batches_tracked"]) == 40_000, "and so it is saved"
    layer.r_max = layer.d_max = 1e6
    x = data(4, 3, 2, 2, dtype=torch.float32)
    expected = source.eval()(x)  # before the layer moves what `assign` makes it share
    torch.testing.assert_close(layer(x), expected)


def test_a_missing_count_still_fails_where_torch_is_strict():
    state = nn.Sequential(randomized(nn.BatchNorm2d(3))).state_dict()
    del state["0.num_batches_tracked"]
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        nn.Sequential(BatchRenorm(3)).load_state_dict(state)


@pytest.mark.parametrize("count", [1, 7, 90_000])
def test_a_files_own_count_is_taken_as_it_is(count):
    source = randomized(nn.BatchNorm2d(3))
    source.num_batches_tracked.fill_(count)
    layer = BatchRenorm(3)
    layer.load_state_dict(source.state_dict())
    assert int(layer.num_batches_tracked) == count
    assert layer.adopt_statistics() is None


@pytest.mark.parametrize(
    "state", [nn.BatchNorm2d(3).state_dict(), without_count(nn.BatchNorm2d(3).state_dict())], ids=["zero", "missing"]
)
def test_fresh_statistics_are_no_convergence(state):
    layer = BatchRenorm(3)
    layer.load_state_dict(state, strict=False)
    assert layer.adopt_statistics() is None
    assert int(layer.num_batches_tracked) == 0


def test_a_file_without_this_layer_changes_nothing():
    layer = randomized(BatchRenorm(3))
    layer.load_state_dict({}, strict=False)
    assert int(layer.num_batches_tracked) == 0


def test_loads_onto_the_meta_device():
    with torch.device("meta"):
        layer = BatchRenorm(3)
    assert layer.adopt_statistics() is None
    layer.load_state_dict(without_count(randomized(nn.BatchNorm2d(3)).state_dict()), assign=True)
    assert int(layer.num_batches_tracked) == 40_000


@pytest.mark.parametrize("buffer", ["running_mean", "running_var"])
def test_conversion_adopts_statistics_without_a_count(buffer):
    layer = BatchRenorm(3, r_warmup=(10, 20), d_warmup=(10, 30))
    getattr(layer, buffer)[2] = 0.5
    assert "0 → 30" in layer.adopt_statistics()
    assert int(layer.num_batches_tracked) == 30


def test_conversion_has_nothing_to_adopt_without_a_schedule():
    assert randomized(BatchRenorm(3, **AT_ONCE)).adopt_statistics() is None


def test_paused_uses_running_statistics_and_moves_nothing():
    layer = randomized(BatchRenorm(3, r_max=1e6, d_max=1e6, **AT_ONCE).double())
    layer.track_running_stats = False
    before = [buffer.clone() for buffer in layer.buffers()]
    x = data(6, 3, 4)
    close(layer(x), copy.deepcopy(layer).eval()(x).detach())
    assert all(torch.equal(one, other) for one, other in zip(before, layer.buffers(), strict=True))


def test_update_bn_of_torch_measures_as_plain_bn_does():
    """SWA's update_bn sets momentum to None and resets: the count is back at the schedule's beginning."""
    layer, plain = randomized(BatchRenorm(3)), randomized(nn.BatchNorm1d(3))
    batches = [data(6, 3, seed=seed, dtype=torch.float32) for seed in range(4)]
    for network in (layer, plain):
        network.num_batches_tracked.fill_(50_000)
        torch.optim.swa_utils.update_bn(batches, network)
    for one, other in zip(layer.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_needs_running_statistics():
    with pytest.raises(ConversionError, match=r"BatchRenorm\(3\).*track_running_stats=False"):
        BatchRenorm(3, track_running_stats=False)


@pytest.mark.parametrize(
    "options",
    [
        {"r_max": 0.5},
        {"r_max": float("inf")},
        {"r_max": "3"},
        {"d_max": -1},
        {"d_max": float("nan")},
        {"r_warmup": (5, 4)},
        {"r_warmup": 5},
        {"d_warmup": "ab"},
        {"d_warmup": (1, 2, 3)},
        {"d_warmup": (-1, 2)},
        {"d_warmup": (0.5, 2)},
    ],
    ids=str,
)
def test_refuses_options_without_sense(options):
    with pytest.raises(ConversionError, match=next(iter(options))):
        BatchRenorm(3, **options)


def test_options_come_from_yaml_and_read_back():
    options = {"r_max": 2, "d_max": 4, "r_warmup": [10, 20], "d_warmup": None}
    layer = BatchRenorm(3, **options)
    assert layer.options() == {"r_max": 2.0, "d_max": 4.0, "r_warmup": (10, 20), "d_warmup": None}
    assert "r_warmup=(10, 20)" in repr(layer)
    assert BatchRenorm(3, **layer.options()).options() == layer.options()


def test_the_correction_is_detached():
    x = torch.rand(3, dtype=torch.float64).requires_grad_()
    r, d = renorm_correction(x, x + 1, torch.zeros(3), torch.ones(3), 1e-5, 3.0, 5.0)
    assert not r.requires_grad
    assert not d.requires_grad


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # inductor's own import
def test_compiled_gradients_see_the_running_statistics_of_the_forward_pass():
    """AOTAutograd would compute r and d again in the backward pass, from buffers that have moved (pytorch#197039).

    The backend is inductor without its code generation: the same decompositions, the same choice of what to keep.
    """
    eager, compiled_layer = (randomized(BatchRenorm(3, momentum=0.9, **AT_ONCE)) for _ in range(2))
    torch._dynamo.reset()
    compiled = torch.compile(compiled_layer, backend="aot_eager_decomp_partition", fullgraph=True)
    x = data(5, 3, 4, dtype=torch.float32).requires_grad_()
    upstream = data(5, 3, 4, seed=3, dtype=torch.float32)
    expected, actual = (
        torch.autograd.grad(network(x), [x, *layer.parameters()], upstream)
        for network, layer in ((eager, eager), (compiled, compiled_layer))
    )
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(compiled_layer.running_var, eager.running_var)


# What dynamo does itself when it traces an autograd function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_once_for_the_whole_schedule():
    options = {"r_warmup": (1, 3), "d_warmup": (0, 4)}
    eager, compiled_layer = (randomized(BatchRenorm(3, **options)) for _ in range(2))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(compiled_layer, backend=backend, fullgraph=True)
    for step in range(6):
        x = data(5, 3, 4, seed=step, dtype=torch.float32)
        torch.testing.assert_close(compiled(x), eager(x))
    assert len(graphs) == 1
    assert int(compiled_layer.num_batches_tracked) == 6
