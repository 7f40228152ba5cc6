"""The compiled statistics where training calls them; what they measure is tested in monitoring/test_statistics.py."""

import copy
import random
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from bn_lightning.functional import fused
from bn_lightning.functional.activation import activation_statistics
from bn_lightning.functional.fused import FusedStatistics


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def check(statistics, x):
    assert statistics.reason == ""
    torch.testing.assert_close(statistics(x), activation_statistics(x), rtol=1e-5, atol=1e-6)


@pytest.fixture
def fresh():
    """Kernels that are compiled for this test alone."""
    fused._compiled.cache_clear()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield FusedStatistics()
    fused._compiled.cache_clear()


def test_any_size_is_one_kernel():
    statistics, compiled = FusedStatistics(), []
    for shape in [(8, 40, 12, 14), (64, 8, 100), (3, 200, 20, 20)]:
        x = draw(*shape)
        check(statistics, x)
        compiled.append(statistics.compile_seconds)
    assert compiled[0] > 0
    assert compiled == compiled[:1] * 3


@pytest.mark.parametrize("mode", ["autocast", "inference", "grad"])
def test_from_a_hook(mode):
    layer, statistics, found = nn.Linear(64, 640), FusedStatistics(), {}

    def hook(module, args, output):
        found.update(output=output, block=statistics(output), grad_enabled=torch.is_grad_enabled())

    layer.register_forward_hook(hook)
    contexts = {
        "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
        "inference": torch.inference_mode(),
        "grad": torch.enable_grad(),
    }
    with contexts[mode]:
        layer(draw(200, 64))
    assert statistics.reason == ""
    assert found["output"].dtype == (torch.bfloat16 if mode == "autocast" else torch.float32)
    assert found["grad_enabled"] == (mode != "inference")
    assert not found["block"].requires_grad
    found["block"].add_(1)  # a tensor made in inference mode could not be written to
    with torch.no_grad():
        expected = activation_statistics(found["output"].detach().clone()) + 1
    torch.testing.assert_close(found["block"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own
def test_while_the_network_itself_is_compiled():
    layer, statistics, blocks = nn.Linear(64, 640), FusedStatistics(), []
    layer.register_forward_hook(lambda module, args, output: blocks.append(statistics(output)))
    network = torch.compile(nn.Sequential(layer, nn.ReLU()), backend="eager")
    x = draw(200, 64)
    for _ in range(2):
        network(x).sum().backward()
    with torch.no_grad():
        expected = activation_statistics(nn.functional.linear(x, layer.weight, layer.bias))
    assert (statistics.reason, len(blocks)) == ("", 2)
    torch.testing.assert_close(blocks[1], expected, rtol=1e-5, atol=1e-6)


def test_without_a_compiler_training_goes_on(fresh):
    x = draw(200, 640)
    with torch._inductor.config.patch({"cpp.cxx": ("/no/such/compiler",)}), warnings.catch_warnings():
        warnings.simplefilter("error")
        block = fresh(x)
        assert "compiler" in fresh.reason.lower()
        assert torch.equal(block, activation_statistics(x))
        reason = fresh.reason
        assert torch.equal(fresh(2 * x), activation_statistics(2 * x))
    assert fresh.reason == reason


def test_switched_off(fresh):
    x = draw(200, 640)
    with torch._dynamo.config.patch(disable=True):  # TORCH_COMPILE_DISABLE=1
        assert torch.equal(fresh(x), activation_statistics(x))
    assert "found no compiled frames" in fresh.reason
    assert torch._dynamo.config.assume_static_by_default, "torch leaves it changed"


def test_too_many_kernels(fresh, monkeypatch):
    monkeypatch.setattr(fused, "_MOST_KERNELS", 0)
    x = draw(200, 640)
    assert torch.equal(fresh(x), activation_statistics(x))
    assert "more than 0" in fresh.reason


def test_an_interrupt_is_not_swallowed(monkeypatch):
    def interrupted(*key):
        raise KeyboardInterrupt

    monkeypatch.setattr(fused, "_compiled", interrupted)
    with pytest.raises(KeyboardInterrupt):
        FusedStatistics()(draw(200, 640))


def test_compiling_leaves_generators_and_the_users_limits_alone(fresh):
    limits = copy.deepcopy(torch._dynamo.config.get_config_copy())

    def states():
        name, keys, position, *rest = np.random.get_state()
        return [torch.get_rng_state().tolist(), random.getstate(), name, keys.tolist(), position, rest]

    before = states()
    with torch._dynamo.config.patch(recompile_limit=1):
        fresh(draw(200, 640))
        fresh(draw(200, 640).double())
    assert fresh.reason == ""
    assert fresh.compile_seconds > 0
    assert states() == before
    assert torch._dynamo.config.get_config_copy() == limits


def test_nothing_of_the_compiler_is_imported_before_the_first_use():
    code = "import sys, bn_lightning.functional.fused as f; f.FusedStatistics(); print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
