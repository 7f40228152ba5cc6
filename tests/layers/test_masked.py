import copy

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import bn_lightning
from bn_lightning.errors import BatchNormError
from bn_lightning.functional.masked import masked_statistics
from bn_lightning.layers import MaskedBatchNorm, valid_positions

SPATIAL = [(), (5,), (3, 4), (2, 3, 2)]


def randomized(layer):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (layer.running_mean, layer.weight, layer.bias):
            if tensor is not None:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
        if layer.running_var is not None:
            layer.running_var.copy_(torch.rand(layer.num_features, generator=generator) + 0.5)
    return layer


def numpy(tensor):
    return None if tensor is None else tensor.detach().double().numpy().copy()


def random(shape, dtype=torch.float64, seed=1):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1).to(dtype)


def mask_of(shape, share=0.6, seed=2):
    """A mask with two valid positions at least."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    mask.view(-1)[:2] = True
    return mask


def written_out(x, mask, weight, bias, eps=1e-5):
    """The definition in tensor operations, for autograd to differentiate."""
    valid = mask.unsqueeze(1).expand_as(x).transpose(0, 1).flatten(1)
    values = torch.stack([v[m] for v, m in zip(x.transpose(0, 1).flatten(1), valid, strict=True)])
    shape = (1, -1, *[1] * (x.dim() - 2))
    var, mean = torch.var_mean(values, 1, correction=0)
    x_hat = (x - mean.view(shape)) / (var + eps).sqrt().view(shape)
    return x_hat * weight.view(shape) + bias.view(shape)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    examples=st.integers(2, 9),
    spatial=st.sampled_from(SPATIAL),
    affine=st.sampled_from([True, "scale", "shift", False]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    share=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    channel_axis=st.booleans(),
)
def test_output_buffers_and_evaluation(examples, spatial, affine, dtype, share, channel_axis):
    layer = randomized(MaskedBatchNorm(3, affine=affine, dtype=torch.promote_types(dtype, torch.float32)))
    x, mask = random((examples, 3, *spatial), dtype), mask_of((examples, *spatial), share)
    expected = reference.masked_batch_norm(numpy(x), mask.numpy(), numpy(layer.weight), numpy(layer.bias))
    moved = [
        reference.moved(numpy(buffer), batch, 0.1)
        for buffer, batch in ((layer.running_mean, expected.mean), (layer.running_var, expected.var))
    ]
    y = layer(x, mask.unsqueeze(1) if channel_axis else mask)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    assert y.dtype == dtype
    np.testing.assert_allclose(numpy(y), expected.y, rtol=tolerance, atol=tolerance)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5  # the buffers are wide
    np.testing.assert_allclose(numpy(layer.running_mean), moved[0], rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(numpy(layer.running_var), moved[1], rtol=tolerance, atol=tolerance)
    assert layer.num_batches_tracked == 1

    before = copy.deepcopy(layer.state_dict())
    torch.testing.assert_close(layer.eval()(x, mask), layer(x), rtol=0, atol=0)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    if dtype == torch.float64:
        stats = (numpy(t) for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias))
        np.testing.assert_allclose(numpy(layer(x)), reference.standardize(numpy(x), *stats, 1e-5), rtol=1e-9)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("spatial", SPATIAL, ids=str)
def test_gradients(spatial, channels_last):
    layer = randomized(MaskedBatchNorm(2, dtype=torch.float64))
    x, mask = random((5, 2, *spatial)), mask_of((5, *spatial))
    if channels_last and len(spatial) >= 2:
        x = x.to(memory_format=torch.channels_last if len(spatial) == 2 else torch.channels_last_3d)
    assert not mask.all()  # what invalid positions get is tested too

    def run(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x, mask))

    parameters = [p.detach().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *parameters))
    grad = random(x.shape, seed=4)
    for ours, theirs in zip(
        torch.autograd.grad(run(x, *parameters), (x, *parameters), grad),
        torch.autograd.grad(written_out(x, mask, *parameters), (x, *parameters), grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_second_derivatives_of_the_statistics():
    mask = mask_of((4, 5)).unsqueeze(1)
    x = random((4, 3, 5)).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: masked_statistics(x, mask)[:2], (x,))


@pytest.mark.parametrize("mask", [None, torch.ones(6, 7, dtype=torch.bool)], ids=["no mask", "all valid"])
def test_every_position_valid_is_plain_batch_norm(mask):
    layer, plain, x = randomized(MaskedBatchNorm(3)), randomized(nn.BatchNorm1d(3)), random((6, 3, 7), torch.float32)
    x.requires_grad_()
    y, expected = layer(x, mask), plain(x)
    torch.testing.assert_close(y, expected)
    grad = random(y.shape, y.dtype, 3)
    torch.testing.assert_close(torch.autograd.grad(y, x, grad), torch.autograd.grad(expected, x, grad))
    torch.testing.assert_close(layer.state_dict(), plain.state_dict())
    layer.track_running_stats = False
    layer(x, mask)
    torch.testing.assert_close(layer.state_dict(), plain.state_dict())  # paused


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_as_accurate_as_torch_at_a_large_mean(memory_format):
    x = torch.randn(64, 3, 24, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.1 + 1e4
    x, mask = x.float().to(memory_format=memory_format), mask_of((64, 24, 24))
    # Padding of another size altogether must leave no trace.
    x = torch.where(mask.unsqueeze(1), x, -1e4)
    mean, var, count = masked_statistics(x, mask.unsqueeze(1))
    valid = np.stack([numpy(x)[:, c][mask.numpy()] for c in range(3)])
    assert count == mask.sum()
    np.testing.assert_allclose(numpy(mean), valid.mean(1), rtol=6e-8)  # half a step of float32
    np.testing.assert_allclose(numpy(var), valid.var(1), rtol=3e-6)


def test_half_precision_is_added_in_float32():
    x = torch.full((64, 1, 64), 300.0, dtype=torch.float16)  # squares and sums overflow in float16
    x[:, :, ::2] = -300.0
    mean, var, _ = masked_statistics(x, torch.ones(64, 1, 64, dtype=torch.bool))
    assert mean.dtype == var.dtype == torch.float32
    assert mean.item() == 0
    assert var.item() == 9e4


def test_padding_of_a_sequential_network_by_the_context_manager():
    net = nn.Sequential(nn.Conv1d(2, 3, 1), MaskedBatchNorm(3), nn.ReLU(), nn.Sequential(MaskedBatchNorm(3)))
    randomized(net[1]), randomized(net[3][0])
    twin = copy.deepcopy(net)
    x, mask = random((4, 2, 6), torch.float32), torch.arange(6) < torch.tensor([6, 1, 3, 2])[:, None]
    with bn_lightning.valid_positions(net, mask):
        y = net(x)
    expected = twin[3][0](twin[2](twin[1](twin[0](x), mask)), mask)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    torch.testing.assert_close(net.state_dict(), twin.state_dict(), rtol=0, atol=0)
    assert net[1].mask is net[3][0].mask is None
    assert list(net.state_dict()) == list(twin.state_dict())


def test_what_is_padded_makes_no_difference_to_what_is_not():
    layer, mask = randomized(MaskedBatchNorm(3)), mask_of((4, 6))
    x = random((4, 3, 6), torch.float32)
    other = torch.where(mask.unsqueeze(1), x, 50.0)
    keep = mask.unsqueeze(1).expand_as(x)
    torch.testing.assert_close(layer(x, mask)[keep], layer(other, mask)[keep])


def test_contexts_nest_and_go_back_after_an_error():
    net = nn.Sequential(MaskedBatchNorm(2), nn.MaxPool1d(2), MaskedBatchNorm(2))
    mask = mask_of((3, 4))
    half = mask[:, ::2]
    with valid_positions(net, mask):
        with valid_positions(net[2], half):
            assert net[0].mask is mask
            assert net[2].mask is half
            net(random((3, 2, 4), torch.float32))
        assert net[2].mask is mask
        with valid_positions(net, None):
            assert net[0].mask is net[2].mask is None
        with pytest.raises(BatchNormError, match=r"\(3, 4\).*\(3, 2\)"):
            net(random((3, 2, 4), torch.float32))
    with pytest.raises(KeyError), valid_positions(net, mask):
        raise KeyError
    assert net[0].mask is net[2].mask is None


def test_the_argument_wins_over_the_context():
    layer, x = randomized(MaskedBatchNorm(2)), random((3, 2, 4), torch.float32)
    one, other = mask_of((3, 4)), mask_of((3, 4), seed=9)
    assert not torch.equal(one, other)
    with valid_positions(layer, one):
        torch.testing.assert_close(layer(x, other), copy.deepcopy(layer)(x, other), rtol=0, atol=0)
        assert not torch.allclose(layer(x), layer(x, other))


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # dynamo's own doing
@pytest.mark.parametrize("by", ["argument", "context"])
def test_compiles_into_one_graph_and_sees_each_mask(by):
    torch._dynamo.reset()
    eager = nn.Sequential(randomized(MaskedBatchNorm(3)))
    twin = copy.deepcopy(eager)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    run = torch.compile(twin if by == "context" else twin[0], fullgraph=True, backend=backend)
    for seed in (1, 2, 3):
        x, mask = random((4, 3, 5), torch.float32, seed), mask_of((4, 5), seed=seed)
        results = []
        for forward, inner in ((run, twin[0]), (eager[0], eager[0])):
            leaf = x.clone().requires_grad_()
            if by == "context":
                with valid_positions(twin if forward is run else eager, mask):
                    y = forward(leaf)
            else:
                y = forward(leaf, mask)
            grads = torch.autograd.grad(y, (leaf, *inner.parameters()), random(y.shape, y.dtype, 4))
            results.append([y, *grads])
        torch.testing.assert_close(*results)
        torch.testing.assert_close(twin.state_dict(), eager.state_dict())
    assert len(graphs) == 1  # a mask is an input, not a constant
    with valid_positions(run, torch.zeros(4, 5, dtype=torch.bool)), pytest.raises(RuntimeError, match="two valid"):
        run(random((4, 3, 5), torch.float32))


def test_checkpointed_layers_find_the_mask_again_in_the_backward_pass():
    layer, mask, x = randomized(MaskedBatchNorm(3)), mask_of((4, 5)), random((4, 3, 5), torch.float32).requires_grad_()
    grad = random((4, 3, 5), torch.float32, 3)
    (expected,) = torch.autograd.grad(layer(x, mask), x, grad)
    with valid_positions(layer, mask):
        (ours,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False), x, grad)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_without_running_statistics_the_mask_counts_in_evaluation_too():
    layer = MaskedBatchNorm(3, track_running_stats=False)
    x, mask = random((4, 3, 5), torch.float32), mask_of((4, 5))
    y = layer(x, mask)
    torch.testing.assert_close(layer.eval()(x, mask), y, rtol=0, atol=0)
    assert not torch.allclose(layer(x), y)


def test_paused_statistics_stay():
    layer = randomized(MaskedBatchNorm(3))
    layer.track_running_stats = False
    before = copy.deepcopy(layer.state_dict())
    layer(random((4, 3, 5), torch.float32), mask_of((4, 5)))
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        pytest.param(
            torch.ones(4, 6, dtype=torch.bool), r"shape \(4, 6\).*\(4, 3, 5\).*has to be \(4, 5\)", id="length"
        ),
        pytest.param(torch.ones(5, dtype=torch.bool), r"shape \(5,\).*has to be \(4, 5\)", id="no examples"),
        pytest.param(torch.ones(4, 3, 5, dtype=torch.bool), r"shape \(4, 3, 5\) for", id="one a channel"),
        pytest.param(torch.ones(1, 5, dtype=torch.bool), r"shape \(1, 5\)", id="to be broadcast"),
        pytest.param(torch.ones(4, 5), r"bool tensor.*float32", id="float"),
        pytest.param([[True] * 5] * 4, r"bool tensor.*list", id="list"),
        pytest.param(torch.ones(4, 5, dtype=torch.bool, device="meta"), r"mask on meta.*input on cpu", id="device"),
    ],
)
def test_masks_that_do_not_fit(mask, message, training):
    layer = randomized(MaskedBatchNorm(3)).train(training)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(BatchNormError, match=message):
        layer(random((4, 3, 5), torch.float32), mask)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("valid", [0, 1])
def test_too_few_valid_positions(valid):
    layer = randomized(MaskedBatchNorm(3))
    before, x = copy.deepcopy(layer.state_dict()), random((4, 3, 5), torch.float32)
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask.view(-1)[:valid] = True
    with pytest.raises(BatchNormError, match=f"two valid positions.*marks {valid}"):
        layer(x, mask)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    layer.eval()
    torch.testing.assert_close(layer(x, mask), layer(x))  # where it changes nothing


def test_a_model_without_the_layer_and_a_wrong_mask_are_refused_at_the_door():
    with (
        pytest.raises(BatchNormError, match=r"Sequential has no MaskedBatchNorm.*convert_batch_norm"),
        valid_positions(nn.Sequential(nn.BatchNorm1d(2)), mask_of((3, 4))),
    ):
        pass
    with pytest.raises(BatchNormError, match="bool tensor"), valid_positions(MaskedBatchNorm(2), torch.ones(3, 4)):
        pass


def test_only_the_input_and_the_mask_are_kept_for_the_backward_pass():
    layer, x, mask = (
        randomized(MaskedBatchNorm(3)),
        random((8, 3, 50), torch.float32).requires_grad_(),
        mask_of((8, 50)),
    )
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x, mask)
    large = [tensor for tensor in kept.values() if tensor.numel() > 3]
    assert {(str(tensor.dtype), tensor.numel()) for tensor in large} == {("torch.bool", 400), ("torch.float32", 1200)}
    assert len(large) == 2


def test_an_empty_batch_with_its_mask_passes():
    layer = MaskedBatchNorm(4)
    y = layer(torch.empty(0, 4, 5), torch.ones(0, 5, dtype=torch.bool))
    assert y.shape == (0, 4, 5)
    assert torch.equal(layer.running_mean, torch.zeros(4))
