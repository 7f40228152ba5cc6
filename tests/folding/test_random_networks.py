"""Random networks: what is folded leaves every output as it was, and what is folded is all that can be.

``FOLDING_EXAMPLES=5000`` draws that many instead of the few of the default run; the same ones each time.
"""

import copy
import gc
import os

import pytest
import torch
import torch.nn.functional as F
from folding.nets import Written, fold_in_float64, rows_of
from folding.oracle import UNFOLDABLE, verdicts
from folding.programs import Program
from folding.random_networks import CHANNELS, SIZE, programs
from hypothesis import HealthCheck, Phase, given, note, settings
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning import fold_batch_norm, plan_fold

EXAMPLES = int(os.environ.get("FOLDING_EXAMPLES", "0"))


def bounded(examples):
    """Draw the same networks each time, few by default."""
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        print_blob=False,
    )


@pytest.fixture(autouse=True, scope="module")
def short_runs():
    """Spare many small runs what would take most of their time: threads, and old objects in garbage collections."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


def images(batch=2, size=SIZE, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, CHANNELS, size, size, dtype=torch.float64, generator=generator)


def held_out(net):
    """Another batch size, and another size of the image where the network takes it."""
    yield images(5, SIZE, seed=2)
    try:
        copy.deepcopy(net).seen(images(1, SIZE + 3, seed=3))
    except (RuntimeError, ValueError):
        return
    yield images(1, SIZE + 3, seed=3)


def assert_same(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max()


@bounded(120)
@given(programs())
def test_outputs_stay_and_undo_restores(program: Program):
    note(str(program))
    for standalone in ("keep", "affine"):
        net = program.build()
        unfolded = copy.deepcopy(net)
        state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        result = fold_batch_norm(net, images(), standalone=standalone)
        if any("proves nothing" in row.detail for row in result.report.rows):
            continue  # the network's output is zero throughout
        assert "unverified" not in [row.reason for row in result.report.rows], str(result)
        for given_images in (images(), *held_out(unfolded)):
            assert_same(copy.deepcopy(net).seen(given_images), copy.deepcopy(unfolded).seen(given_images))
        left = {name for name, module in net.named_modules() if isinstance(module, _BatchNorm)}
        allowed = {
            name for name, node in program.layers.items() if node.options.get("kind") in UNFOLDABLE
        } | program.hooks.keys()
        assert standalone == "keep" or left <= allowed
        result.undo()
        restored = net.state_dict()
        assert list(restored) == list(state)
        assert all(torch.equal(tensor, restored[name]) for name, tensor in state.items())


def input_gradient(net, x):
    """Autograd refuses some operations in place; then there is none."""
    x.requires_grad_(True)
    try:
        # Not the sum of squares, which normalization by the batch keeps as it is.
        weighed = [(output * torch.arange(output.numel()).cos().view_as(output)).sum() for output in net(x.clone())]
        return torch.autograd.grad(sum(weighed), x, allow_unused=True)[0]
    except RuntimeError:
        return None


@bounded(120)
@given(programs())
def test_gradients_stay(program: Program):
    note(str(program))
    net = program.build()
    expected = input_gradient(copy.deepcopy(net), images())
    result = fold_batch_norm(net, images())
    if expected is None or not expected.any():
        return
    assert "unverified" not in [row.reason for row in result.report.rows], str(result)
    found = input_gradient(net, images())
    assert found is not None, "the folded network can no longer be differentiated"
    assert_same([found], [expected])


@bounded(250)
@given(programs())
def test_the_plan_is_what_the_oracle_finds(program: Program):
    note(str(program))
    with torch.no_grad():
        expected = verdicts(program)
    for row in plan_fold(program.build(), images()).rows:
        verdict = expected[row.name]
        found = (row.action, frozenset(row.into.split(", ") if row.into else ()))
        assert found == (verdict.action, verdict.into), f"{row}\noracle: {verdict}"


def norm(features=4, **options):
    return nn.BatchNorm2d(features, **options)


#: What random networks found: minimal networks that were planned wrongly, with the right rows.
FOUND = {
    "merged-behind-a-norm-that-is-also-returned": (
        lambda: Written(lambda n, x: n.a(x) * n.b(n.a(x.tanh())), a=norm(), b=norm()),
        {"a": "kept", "b": "kept"},
    ),
    "merged-behind-a-norm-without-affine-that-is-also-returned": (
        lambda: Written(lambda n, x: n.a(x) * n.b(n.a(x.tanh())), a=norm(affine=False), b=norm()),
        {"a": "kept", "b": "kept"},
    ),
    "merged-into-a-norm-that-reads-its-own-output": (
        lambda: Written(lambda n, x: n.b(n.b(n.a(x.tanh()))).tanh(), a=norm(), b=norm()),
        {"a": "kept", "b": "kept"},
    ),
    "merged-behind-a-norm-that-reads-its-own-output": (
        lambda: Written(lambda n, x: n.b(n.a(n.a(x.tanh()))).tanh(), a=norm(), b=norm()),
        {"a": "kept", "b": "kept"},
    ),
    "forward-under-a-maximum": (
        lambda: Written(lambda n, x: n.next(F.max_pool2d(n.a(x.tanh()), 2)), a=norm(), next=nn.Conv2d(4, 3, 1)),
        {"a": "kept"},
    ),
}


@pytest.mark.parametrize(("make", "expected"), FOUND.values(), ids=FOUND.keys())
def test_found_by_random_networks(randomize, make, expected):
    result = fold_in_float64(randomize(make()), images())
    assert {name: action for name, (action, _) in rows_of(result).items()} == expected


def test_forward_under_a_maximum_with_positive_scales(randomize):
    net = randomize(FOUND["forward-under-a-maximum"][0]())
    with torch.no_grad():
        net.a.weight.abs_()
    assert rows_of(fold_in_float64(net, images())) == {"a": ("folded-forward", "next")}
