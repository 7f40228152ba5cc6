"""Three gloo processes with unequal shares of a batch, against one process with all of it."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from layers import replicas
from layers.replicas import CASES, CHANNELS, WORLD, build, shard
from torch import nn

from bn_lightning.errors import BatchNormError, ConversionError
from bn_lightning.functional.cross_replica import pool_variances
from bn_lightning.layers import BatchRenorm, CrossReplicaBatchNorm

BY_CASE = pytest.mark.parametrize("name", CASES)
# A few roundings of the output's size; in half precision inputs and outputs themselves are rounded.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each process found."""
    folder = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    program = [sys.executable, replicas.__file__]
    running = [subprocess.Popen([*program, str(rank), str(folder)], env=environment) for rank in range(WORLD)]
    try:
        assert [one.wait(timeout=120) for one in running] == [0] * WORLD
    finally:
        for one in running:  # where one fails, the others wait for it
            one.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def expected(case, group):
    """The step of one process with the whole batch, in float64: y, gradients, batch statistics."""
    layer = build(case).double()
    x, grad = (torch.cat([shard(case, rank)[i] for rank in group]).double() for i in (0, 1))
    x.requires_grad_()
    r = d = None
    axes = [axis for axis in range(x.dim()) if axis != 1]
    mean, var = x.mean(axes, keepdim=True), x.var(axes, keepdim=True, correction=0)
    y = (x - mean) / torch.sqrt(var + layer.eps)
    if case.renorm is not None:
        running_mean, running_var = (b.view(mean.shape[1:]) for b in (layer.running_mean, layer.running_var))
        sigma = torch.sqrt(running_var + layer.eps)
        r = (torch.sqrt(var + layer.eps) / sigma).clamp(1 / case.renorm[0], case.renorm[0]).detach()
        d = ((mean - running_mean) / sigma).clamp(-case.renorm[1], case.renorm[1]).detach()
        y = y * r + d
    for parameter, combine in ((layer.weight, torch.mul), (layer.bias, torch.add)):
        y = y if parameter is None else combine(y, parameter.view(mean.shape[1:]))
    y.backward(grad)
    return layer, x, y


def numpy_step(case, layer, shards):
    weight, bias = (None if p is None else p.detach().numpy() for p in (layer.weight, layer.bias))
    if case.renorm is None:
        return reference.cross_replica_batch_norm(shards, weight, bias, layer.eps)
    buffers = layer.running_mean.numpy(), layer.running_var.numpy()
    step = reference.batch_renorm(np.concatenate(shards), *buffers, *case.renorm, weight, bias, layer.eps)
    return step._replace(y=np.split(step.y, np.cumsum([len(shard) for shard in shards])[:-1]))


def compare(actual, wanted, case):
    tolerance = TOLERANCE[case.dtype] if not case.offset else 1e-2  # float32 knows x to 1e-3 σ there
    torch.testing.assert_close(actual.double(), torch.as_tensor(wanted), rtol=tolerance, atol=tolerance)


@BY_CASE
def test_output_and_buffers_are_those_of_the_whole_batch(found, name):
    case = CASES[name]
    layer = build(case).double()
    step = numpy_step(case, layer, [shard(case, rank)[0].double().numpy() for rank in case.members])
    for y, rank in zip(step.y, case.members, strict=True):
        mine = found[rank][name]
        assert mine["y"].dtype == case.dtype
        compare(mine["y"], y, case)
        if len(case.tail) >= 2:  # torch has no memory format of its own for the others
            assert mine["strides"] == shard(case, rank)[0].stride()
        if not case.track:
            continue
        momentum = 0.0 if case.paused else 1 / 8 if case.momentum is None else case.momentum
        mean = reference.moved(layer.running_mean, step.mean, momentum)
        var = reference.moved(layer.running_var, step.var, momentum)
        np.testing.assert_allclose(mine["running_mean"], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(mine["running_var"], var, rtol=1e-5 if not case.offset else 1e-4)
        assert mine["num_batches_tracked"] == (7 if case.paused else 8)
        weight, bias = (None if p is None else p.detach().numpy() for p in (layer.weight, layer.bias))
        x = shard(case, rank)[0].double().numpy()
        compare(mine["evaluated"], reference.standardize(x, mean, var, weight, bias, layer.eps), case)


@BY_CASE
def test_gradients_are_those_of_the_whole_batch(found, name):
    case = CASES[name]
    layer, x, _ = expected(case, case.members)
    for part, rank in zip(x.grad.split([case.sizes[rank] for rank in case.members]), case.members, strict=True):
        if case.input_needs_gradient:
            compare(found[rank][name]["x"], part, case)
        else:
            assert found[rank][name]["x"] is None
    for parameter, value in layer.named_parameters():
        local = [found[rank][name][parameter] for rank in case.members]
        # Its own share in every process, zeros where there was no example: DDP averages them.
        assert all(not share.any() for share, rank in zip(local, case.members, strict=True) if not case.sizes[rank])
        compare(sum(share.double() for share in local), value.grad, case)


@BY_CASE
def test_all_processes_keep_the_same_buffers(found, name):
    for key in ("running_mean", "running_var", "num_batches_tracked") if CASES[name].track else ():
        values = [found[rank][name][key] for rank in CASES[name].members]
        assert all(torch.equal(value, values[0]) for value in values)


@pytest.mark.parametrize("name", ["group", "renorm-group"])
def test_a_process_outside_the_group_is_on_its_own(found, name):
    case = CASES[name]
    layer, x, y = expected(case, [1])
    compare(found[1][name]["y"], y.detach(), case)
    compare(found[1][name]["x"], x.grad, case)
    compare(found[1][name]["weight"], layer.weight.grad, case)


def test_one_collective_a_direction_and_none_in_evaluation(found):
    assert [one["collectives"] for one in found] == [[1, 2, 2]] * WORLD


def test_too_few_values_in_all_processes_are_refused_by_all(found):
    for one in found:
        for message, number in zip(one["refusals"], (1, 0), strict=True):
            assert f"3 processes have {number} together" in message
        assert all("buffers kept: True" in message for message in one["refusals"])


def test_training_with_ddp_is_training_on_the_whole_batch(found):
    net = replicas.network(nn.BatchNorm1d)
    replicas.train(net, *replicas.data())
    for one in found:
        torch.testing.assert_close(one["ddp"], net.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["recomputed", "compiled"])
def test_checkpointing_and_compiling_give_the_same_gradients(found, name):
    for one in found:
        assert torch.equal(*one[name])


def test_copies_share_the_process_group(found):
    assert all(one["copied"] for one in found)


@pytest.mark.parametrize("affine", [True, "scale", "shift", False])
def test_one_process_is_plain_batch_norm(affine):
    case = replicas.Case((6, 0, 0), affine=affine)
    layer, plain = build(case), nn.BatchNorm2d(CHANNELS, 1e-3)
    plain.weight, plain.bias = copy.deepcopy(layer.weight), copy.deepcopy(layer.bias)
    plain.load_state_dict(layer.state_dict())
    results = []
    for one in (layer, plain):
        x, grad = shard(case, 0)
        y = one(x.requires_grad_())
        y.backward(grad)
        results.append([y.detach(), x.grad, *(parameter.grad for parameter in one.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(dict(layer.named_buffers()), dict(plain.named_buffers()))  # lerp rounds otherwise


def test_one_process_with_renorm_is_batch_renorm():
    case = replicas.Case((6, 0, 0), renorm=(1.2, 0.3))
    layer = build(case)
    other = BatchRenorm(CHANNELS, 1e-3, r_max=1.2, d_max=0.3, r_warmup=None, d_warmup=None)
    other.load_state_dict(layer.state_dict())
    x = shard(case, 0)[0]
    assert torch.equal(layer(x), other(x))
    torch.testing.assert_close(layer.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_the_schedule_follows_the_count():
    layer = CrossReplicaBatchNorm(2, renorm=True, r_max=3.0, d_max=5.0, r_warmup=(10, 30), d_warmup=(0, 10))
    layer.num_batches_tracked.fill_(20)
    assert [limit.item() for limit in layer.current_limits()] == [2.0, 5.0]


@pytest.mark.parametrize(("renorm", "count"), [(True, 40_000), (False, 0)], ids=["renorm", "plain"])
def test_statistics_without_a_count_are_converged_for_renorm_alone(renorm, count):
    layer = CrossReplicaBatchNorm(2, renorm=renorm)
    layer.running_mean.fill_(3.0)
    assert (layer.adopt_statistics() is not None) == renorm
    assert layer.num_batches_tracked == count


def test_loading_a_file_without_a_count_keeps_the_layers_own():
    layer = CrossReplicaBatchNorm(2)
    layer.num_batches_tracked.fill_(9)
    layer.load_state_dict({"running_mean": torch.ones(2), "running_var": torch.ones(2)}, strict=False)
    assert layer.num_batches_tracked == 9


# What dynamo does itself when it traces an autograd function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("renorm", [False, True], ids=["plain", "renorm"])
def test_compiles_in_one_process(renorm):
    layer = build(replicas.Case((6, 0, 0), renorm=(1.2, 0.3) if renorm else None))
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    grads = []
    for one in (layer, compiled):
        x, grad = shard(CASES["equal"], 0)
        one(x.requires_grad_()).backward(grad)
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(dict(compiled._orig_mod.named_buffers()), dict(layer.named_buffers()))


def test_pickles_and_copies_without_a_group():
    layer = build(CASES["renorm-clipped"])
    for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert other.options() == layer.options()
        torch.testing.assert_close(other.state_dict(), layer.state_dict(), rtol=0, atol=0)


def test_one_value_in_one_process_is_refused():
    with pytest.raises(BatchNormError, match="more than one value per channel"):
        CrossReplicaBatchNorm(3)(torch.randn(1, 3))


def test_renorm_needs_running_statistics():
    with pytest.raises(ConversionError, match="corrects batch statistics towards running ones"):
        CrossReplicaBatchNorm(3, track_running_stats=False, renorm=True)


def test_pooling_is_exact_at_a_large_mean_and_with_empty_samples():
    x = 1e8 + torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = x[:0], x[:1], x[1:7], x[:0], x[7:]
    counts = torch.tensor([[float(len(part))] for part in parts], dtype=torch.float64)
    nothing = torch.zeros(3, dtype=x.dtype)
    means = torch.stack([part.mean(0) if len(part) else nothing for part in parts])
    variances = torch.stack([part.var(0, correction=0) if len(part) else nothing for part in parts])
    count, mean, var = pool_variances(counts, means, variances)
    assert count == 20
    np.testing.assert_allclose(mean, x.numpy().mean(0), rtol=1e-15)
    np.testing.assert_allclose(var, x.numpy().var(0), rtol=1e-6)
