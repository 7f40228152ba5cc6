"""Domain BN: each domain is a plain BN of its own, and a context says which."""

import copy

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers.domain_layers import assert_same, batch, build, numpy, of_domain, state
from torch import nn

from bn_lightning import convert_batch_norm, use_domain
from bn_lightning.errors import BatchNormError, ConversionError
from bn_lightning.layers.domain import DomainBatchNorm

AFFINE = [True, "scale", "shift", False]


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    rest=st.lists(st.integers(1, 4), max_size=3),
    affine=st.sampled_from(AFFINE),
    own=st.booleans(),
    momentum=st.sampled_from([0.3, None]),
    domain=st.integers(0, 2),
)
def test_a_step_and_evaluation_match_numpy_and_touch_their_domain_alone(rest, affine, own, momentum, domain):
    layer, x = build(affine=affine, per_domain_affine=own, momentum=momentum), batch((4, 3, *rest))
    before = [{key: numpy(value) for key, value in of_domain(layer, d).items()} for d in range(3)]
    at_hand = before[domain]
    step = reference.batch_norm(x.numpy(), at_hand.get("weight"), at_hand.get("bias"))
    weight = momentum or 1 / (at_hand["num_batches_tracked"] + 1)
    with use_domain(layer, domain):
        np.testing.assert_allclose(numpy(layer(x)), step.y, rtol=1e-9, atol=1e-12)
        moved = {
            "running_mean": reference.moved(at_hand["running_mean"], step.mean, weight),
            "running_var": reference.moved(at_hand["running_var"], step.var, weight),
            "num_batches_tracked": at_hand["num_batches_tracked"] + 1,
        }
        after = [at_hand | moved if d == domain else before[d] for d in range(3)]
        for d in range(3):
            for key, value in of_domain(layer, d).items():
                np.testing.assert_allclose(numpy(value), after[d][key], rtol=1e-9)
        expected = reference.standardize(
            x.numpy(),
            moved["running_mean"],
            moved["running_var"],
            at_hand.get("weight"),
            at_hand.get("bias"),
            layer.eps,
        )
        kept = state(layer)
        np.testing.assert_allclose(numpy(layer.eval()(x)), expected, rtol=1e-9, atol=1e-12)
    assert_same(state(layer), kept)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("domain", [0, 2])
def test_gradients(domain, training):
    layer, x = build(per_domain_affine=True).train(training), batch((4, 3, 2)).requires_grad_()
    layer.track_running_stats = False
    names = [f"other_{name}_{domain}" if domain else name for name in ("weight", "bias")]
    parameters = [getattr(layer, name) for name in names]

    def call(x, *parameters):
        with use_domain(layer, domain):
            return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters))


@pytest.mark.parametrize("momentum", [0.1, None], ids="momentum={}".format)
def test_nothing_moves_while_statistics_are_paused(momentum):
    layer = build(momentum=momentum)
    before = state(layer)
    layer.track_running_stats = False
    with use_domain(layer, 1):
        y = layer(batch())
    assert_same(state(layer), before)
    np.testing.assert_allclose(
        numpy(y), reference.batch_norm(batch().numpy(), numpy(layer.weight), numpy(layer.bias)).y, rtol=1e-9, atol=1e-12
    )


def test_without_running_statistics_the_batch_counts():
    layer = build(track_running_stats=False, per_domain_affine=True)
    assert all(not key.startswith("other_running") for key in layer.state_dict())
    for call in (layer, layer.eval()):
        with use_domain(call, 2):
            expected = reference.batch_norm(batch().numpy(), numpy(layer.other_weight_2), numpy(layer.other_bias_2)).y
            np.testing.assert_allclose(numpy(call(batch())), expected, rtol=1e-9, atol=1e-12)


# --- Choosing


def test_the_context_nests_and_is_left_after_an_error():
    net = nn.Sequential(nn.Identity(), build(), nn.Sequential(build(num_domains=4)))
    layers = [net[1], net[2][0]]
    with use_domain(net, 1):
        with pytest.raises(BatchNormError, match="takes"), use_domain(net, 2):
            net(torch.ones(4, 7, 3, dtype=torch.float64))
        assert [layer.domain for layer in layers] == [1, 1]
        with use_domain(layers[1], 3):
            assert [layer.domain for layer in layers] == [1, 3]
        assert [layer.domain for layer in layers] == [1, 1]
    assert [layer.domain for layer in layers] == [0, 0]


@pytest.mark.parametrize("domain", [-1, 3, 1.0, None, "1"], ids=repr)
def test_a_domain_that_there_is_not_is_refused_before_anything_changes(domain):
    net = nn.Sequential(build(num_domains=4), build())
    with pytest.raises(BatchNormError, match=r"'[01]': there is no domain .* num_domains=[34] they are 0 to [23]"):
        use_domain(net, domain).__enter__()
    assert [layer.domain for layer in net] == [0, 0]
    net[1].domain = domain
    with pytest.raises(BatchNormError, match="there is no domain"):
        net[1](batch())


def test_a_model_without_domains_is_refused():
    with pytest.raises(BatchNormError, match="Sequential has no DomainBatchNorm"), use_domain(nn.Sequential(), 1):
        pass


@pytest.mark.parametrize("num_domains", [1, 0, -2, 2.0, None], ids=repr)
def test_fewer_than_two_domains_are_refused(num_domains):
    with pytest.raises(ConversionError, match="num_domains counts the domains"):
        DomainBatchNorm(3, num_domains=num_domains)


# --- Training


def test_adversarial_batches_have_statistics_of_their_own():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
    clean, attacked = (copy.deepcopy(net[1]) for _ in range(2))
    convert_batch_norm(net, "domain")
    optimizer, loss_of = torch.optim.SGD(net.parameters(), 0.5), nn.CrossEntropyLoss()
    for _ in range(20):
        x = torch.randn(64, 8, requires_grad=True)
        target = (x[:, 0] > 0).long()
        with use_domain(net, 1):
            (gradient,) = torch.autograd.grad(loss_of(net(x), target), x)
            adversary = (x + 0.5 * gradient.sign()).detach()
            adversarial = loss_of(net(adversary), target)
        for alone, seen in ((clean, x), (attacked, x), (attacked, adversary)):
            alone(net[0](seen))
        loss = loss_of(net(x), target) + adversarial
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for domain, alone in enumerate((clean, attacked)):
        assert_same(of_domain(net[1], domain), of_domain(net[1], domain) | dict(alone.named_buffers()))
    variances = net[1].running_var, net[1].other_running_var[0]
    assert (variances[1] / variances[0]).log().abs().max() > 0.1


@pytest.mark.parametrize("domain", [0, 1, 2])
def test_scale_and_shift_of_other_domains_rest_whatever_the_optimizer(domain):
    layer = build(per_domain_affine=True)
    optimizer = torch.optim.AdamW(layer.parameters(), 0.1, weight_decay=0.1)
    for at_hand in (0, 1, 2, domain, domain):  # moments everywhere first: they would go on moving what has a gradient
        before = state(layer)
        optimizer.zero_grad()
        with use_domain(layer, at_hand):
            layer(batch()).square().sum().backward()
        optimizer.step()
        for d in range(3):
            for name in ("weight", "bias"):
                key = f"other_{name}_{d}" if d else name
                assert torch.equal(layer.state_dict()[key], before[key]) == (d != at_hand)


def test_several_domains_in_one_backward_pass():
    layer = build(per_domain_affine=True)
    xs = [batch(seed=seed).requires_grad_() for seed in range(3)]
    total = 0
    for domain, x in enumerate(xs):
        with use_domain(layer, domain):
            total = total + layer(x).pow(3).sum()
    gradients = torch.autograd.grad(total, xs)
    for domain, (x, gradient) in enumerate(zip(xs, gradients, strict=True)):
        with use_domain(layer, domain):
            (alone,) = torch.autograd.grad(layer(x).pow(3).sum(), x)
        torch.testing.assert_close(gradient, alone)


@pytest.mark.parametrize("momentum", [0.1, None], ids="momentum={}".format)
def test_compiles_whole_in_every_domain(momentum):
    torch._dynamo.reset()
    eager = build(per_domain_affine=True, momentum=momentum)
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        for domain in (0, 1, 2, 1):
            results = []
            for call, owner in ((compiled, layer), (eager, eager)):
                call.train(training)
                x = batch().requires_grad_()
                with use_domain(call, domain):
                    y = call(x)
                weight = owner.tensors(domain).weight
                results.append((y, *torch.autograd.grad(y.pow(3).sum(), (x, weight))))
            torch.testing.assert_close(*results)
            torch.testing.assert_close(state(layer), state(eager))
