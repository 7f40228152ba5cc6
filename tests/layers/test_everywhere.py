"""What every registered variant does: shapes, dtypes, formats, compilation, checkpoints, pickling."""

import copy
import io

import pytest
import torch
from torch import nn

from bn_lightning.errors import BatchNormError
from bn_lightning.layers.registry import VARIANTS

C = 4
# Settings under which evaluation is plain BN, and training does what the variant is for.
OPTIONS = {
    "adaptive": {"alpha": 0.0},
    "ghost": {"virtual_batch_size": 4},
    "renorm": {"r_warmup": None, "d_warmup": None},
}
# Draws random numbers; everything else is a function of its input.
RANDOM = {"noisy"}
NAMES = sorted(VARIANTS)
STEPS = 1000  # a file that has statistics but no count stands for a converged network
SHAPES = [(12, C), (6, C, 5), (6, C, 4, 3), (4, C, 2, 3, 2), (4, C, 2, 1, 2, 2)]
AFFINE = [True, "scale", "shift", False]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def build(name, **settings):
    layer = VARIANTS[name](C, **{**OPTIONS.get(name, {}), **settings})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, tensor in layer.state_dict().items():
            if key.endswith("num_batches_tracked"):
                tensor.fill_(STEPS)
            elif key.endswith("var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return layer


def x_of(shape, dtype=torch.float32, seed=1):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + 1).to(dtype)


def plain_evaluation(layer, x):
    wide = torch.promote_types(x.dtype, torch.float32)
    tensors = (
        None if t is None else t.detach().to(wide)
        for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    )
    return nn.functional.batch_norm(x.to(wide), *tensors, False, 0.0, layer.eps).to(x.dtype)


def step(layer, x):
    """One training step: output, gradient of the input and of the parameters."""
    torch.manual_seed(3)
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(x_of(y.shape, y.dtype, seed=2).to(memory_format=torch.preserve_format))
    return y.detach(), x.grad, [p.grad for p in layer.parameters()]


def buffers(layer):
    return {name: value.clone() for name, value in layer.named_buffers()}


@pytest.mark.parametrize("affine", AFFINE, ids="affine={}".format)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_axes_and_every_kind_of_affine(name, shape, affine):
    layer, x = build(name, affine=affine), x_of(shape)
    y, grad, grads = step(layer, x)
    assert y.shape == grad.shape == shape
    assert y.isfinite().all()
    assert grad.isfinite().all()
    assert (layer.weight is not None, layer.bias is not None) == (affine in (True, "scale"), affine in (True, "shift"))
    assert all(g is not None and g.isfinite().all() for g in grads)
    assert repr(affine) in repr(layer)
    torch.testing.assert_close(layer.eval()(x), plain_evaluation(layer, x))


@pytest.mark.parametrize("name", NAMES)
def test_the_bias_keyword_is_torchs(name):
    layer = build(name, bias=False)
    assert layer.weight is not None
    assert layer.bias is None


@pytest.mark.parametrize("parameters", ["float32", "same"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_dtypes(name, dtype, parameters):
    own = dtype if parameters == "same" or dtype == torch.float64 else torch.float32
    layer, wide, x = build(name).to(own), build(name).to(torch.float64), x_of((8, C, 5), dtype)
    wide.load_state_dict(
        {key: value.double() if value.is_floating_point() else value for key, value in layer.state_dict().items()}
    )
    y, grad, _ = step(layer, x)
    expected, expected_grad, _ = step(wide, x.double())
    assert y.dtype == grad.dtype == dtype
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    if name not in RANDOM:
        torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(grad.double(), expected_grad, rtol=tolerance, atol=tolerance)
    for key, value in layer.named_buffers():
        assert value.dtype == (own if value.is_floating_point() else torch.long)
        torch.testing.assert_close(
            value.double(), dict(wide.named_buffers())[key].double(), rtol=tolerance, atol=tolerance
        )
    evaluated = layer.eval()(x)
    assert evaluated.dtype == dtype
    torch.testing.assert_close(evaluated.double(), plain_evaluation(layer, x).double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_autocast(name, dtype):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, C, 3), build(name), nn.ReLU(), nn.Flatten(), nn.Linear(C * 16, 2))
    with torch.autocast("cpu", dtype):
        out = network(x_of((8, 3, 6, 6)))
    out.float().square().mean().backward()
    assert out.dtype == dtype
    assert all(
        p.grad is not None and p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in network.parameters()
    )
    assert network[1].running_var.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # dynamo's own doing
@pytest.mark.parametrize("name", NAMES)
def test_compiles_into_one_graph(name):
    torch._dynamo.reset()
    eager = build(name)
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for seed, examples in ((1, 8), (2, 8), (3, 12)):  # another size, as the last batch of an epoch has
        x = x_of((examples, C, 3, 3), seed=seed)
        for ours, theirs in zip(step(compiled, x), step(eager, x), strict=True):
            torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(dict(layer.named_buffers()), dict(eager.named_buffers()))
    compiled.eval(), eager.eval()
    torch.testing.assert_close(compiled(x), eager(x))


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", NAMES)
def test_exports_in_evaluation_with_a_batch_of_any_size(name):
    layer = nn.Sequential(build(name)).eval()
    free = ({0: torch.export.Dim("n", min=2)},)
    exported = torch.export.export(layer, (x_of((3, C, 2, 2)),), dynamic_shapes=free).module()
    for examples in (2, 7):
        torch.testing.assert_close(exported(x_of((examples, C, 2, 2))), layer(x_of((examples, C, 2, 2))))


@pytest.mark.parametrize("shape", [(8, C, 4, 3), (8, C, 2, 3, 2)], ids=["2d", "3d"])
@pytest.mark.parametrize("name", NAMES)
def test_channels_last(name, shape):
    memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    settings = {"virtual_batch_size": 8} if name == "ghost" else {}  # its groups are others in this format
    layer, other, x = build(name, **settings), build(name, **settings), x_of(shape)
    y, grad, grads = step(layer, x.to(memory_format=memory_format))
    assert y.is_contiguous(memory_format=memory_format)
    assert grad.is_contiguous(memory_format=memory_format)
    expected, expected_grad, expected_grads = step(other, x)
    if name not in RANDOM:
        torch.testing.assert_close(y.contiguous(), expected)
        torch.testing.assert_close(grad.contiguous(), expected_grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(buffers(layer), buffers(other))
    assert layer.eval()(x.to(memory_format=memory_format)).is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("name", NAMES)
def test_a_view_with_odd_strides(name):
    layer, other = build(name, **({"virtual_batch_size": 8} if name == "ghost" else {})), None
    other = copy.deepcopy(layer)
    x = x_of((8, 6, C)).transpose(1, 2)  # what comes of a linear layer over a sequence
    ours, theirs = step(layer, x), step(other, x.contiguous())
    if name not in RANDOM:
        torch.testing.assert_close([*ours[:2]], [*theirs[:2]])


@pytest.mark.parametrize("affine", AFFINE, ids="affine={}".format)
@pytest.mark.parametrize("name", sorted(set(NAMES) - {"domain"}))
def test_checkpoints_load_both_ways(name, affine):
    layer = build(name, affine=affine)
    step(layer, x_of((8, C, 3, 3)))
    plain = nn.BatchNorm2d(C, affine=affine is not False)
    for key, present in (("weight", affine in (True, "scale")), ("bias", affine in (True, "shift"))):
        if not present:
            setattr(plain, key, None)
    assert list(layer.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(layer.state_dict(), strict=True)
    x = x_of((8, C, 3, 3))
    torch.testing.assert_close(plain.eval()(x), layer.eval()(x))
    fresh = VARIANTS[name](C, affine=affine, **OPTIONS.get(name, {}))
    fresh.load_state_dict(plain.state_dict(), strict=True)
    torch.testing.assert_close(fresh.state_dict(), layer.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(fresh.eval()(x), plain(x))


@pytest.mark.parametrize("how", ["deepcopy", "whole model saved"])
@pytest.mark.parametrize("name", NAMES)
def test_copies(name, how):
    layer = build(name)
    if how == "deepcopy":
        twin = copy.deepcopy(layer)
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert twin.options() == layer.options()
    x = x_of((8, C, 3))
    for ours, theirs in zip(step(twin, x), step(layer, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    torch.testing.assert_close(buffers(twin), buffers(layer), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_paused_statistics_stay_bit_for_bit(name):
    layer, x = build(name), x_of((8, C, 3))
    reference = copy.deepcopy(layer)
    before = buffers(layer)
    layer.track_running_stats = False  # what `paused_statistics` and Lightning's finetuning do to a BN
    ours = step(layer, x)
    assert all(torch.equal(value, before[key]) for key, value in layer.named_buffers())
    for one, other in zip(ours, step(reference, x), strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(layer.eval()(x), plain_evaluation(layer, x))


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"frozen"}))
def test_training_moves_and_counts_and_evaluation_does_neither(name):
    layer, x = build(name), x_of((8, C, 3))
    before, bindings = buffers(layer), dict(layer.named_buffers())
    step(layer, x)
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        assert not torch.equal(getattr(layer, key), before[key]), key
        assert getattr(layer, key) is bindings[key], "buffers are written in place, never rebound"
    assert layer.num_batches_tracked == STEPS + 1
    before = buffers(layer)
    layer.eval()(x)
    assert all(torch.equal(value, before[key]) for key, value in layer.named_buffers())


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"frozen"}))
def test_one_value_per_channel_is_refused_in_training_before_anything_moves(name):
    layer = build(name)
    before = buffers(layer)
    for shape in ((1, C), (1, C, 1, 1)):
        with pytest.raises(BatchNormError, match="one value per channel"):
            layer(x_of(shape))
    assert all(torch.equal(value, before[key]) for key, value in layer.named_buffers())
    assert layer.eval()(x_of((1, C))).shape == (1, C)


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_number_of_channels_is_named(name):
    with pytest.raises(BatchNormError, match=rf"{VARIANTS[name].__name__}\({C}\) takes \(N, {C}, \*\), got shape"):
        build(name)(x_of((2, C + 1, 3)))


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"frozen", "renorm"}))
def test_without_running_statistics_training_works_and_evaluation_takes_the_batchs(name):
    layer, x = build(name, track_running_stats=False), x_of((8, C, 3))
    y = step(layer, x)[0]
    assert y.isfinite().all()
    expected = nn.functional.batch_norm(x, None, None, layer.weight, layer.bias, True, 0.0, layer.eps)
    expected = y if name == "lp" else expected  # whose batch statistics are others
    torch.testing.assert_close(layer.eval()(x), expected)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_gives_an_empty_output_and_moves_nothing(name):
    layer, plain = build(name), nn.BatchNorm2d(C)
    before = buffers(layer)
    for training in (True, False):
        for one in (layer.train(training), plain.train(training)):
            x = torch.empty(0, C, 3, 3, requires_grad=True)
            y = one(x)
            y.sum().backward()
            assert y.shape == x.grad.shape == (0, C, 3, 3)
    for key in ("running_mean", "running_var"):
        assert torch.equal(getattr(layer, key), before[key])


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"debiased", "frozen"}))
def test_momentum_none_averages_all_batches_alike(name):
    layer = build(name, momentum=None)
    layer.num_batches_tracked.zero_()
    seen = []
    for seed in range(3):
        one = build(name, momentum=1.0)
        step(one, x_of((8, C, 3), seed=seed))
        seen.append(one.running_mean.clone())
        step(layer, x_of((8, C, 3), seed=seed))
    torch.testing.assert_close(layer.running_mean, torch.stack(seen).mean(0))


@pytest.mark.parametrize("name", sorted(set(NAMES) - RANDOM))
def test_no_more_activations_are_kept_than_by_torchs_own(name):
    def kept(layer):
        storages = {}
        x = x_of((8, C, 16, 16)).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: storages.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t
        ):
            layer(x)
        return sum(t.untyped_storage().nbytes() for t in storages.values())

    small = 4 * 20 * 8 * C
    assert kept(build(name)) < kept(nn.BatchNorm2d(C)) + small


@pytest.mark.parametrize("name", NAMES)
def test_the_printed_layer_shows_its_settings(name):
    layer = build(name)
    for option, value in layer.options().items():
        assert f"{option}={value}" in repr(layer)
