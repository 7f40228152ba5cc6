import contextlib
import random
from collections import defaultdict, deque

import numpy as np
import pytest
import torch
from torch import nn

from bn_lightning.errors import BatchNormError
from bn_lightning.preservation import (
    in_float64,
    on_device,
    out_of_inference_mode,
    preserved,
    preserved_rng,
    written_back,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Dropout(), nn.BatchNorm2d(3), nn.Flatten())
    net[1].running_mean.copy_(torch.tensor([1.0, -0.0, float("nan")]))
    net[3].eval()
    net(torch.randn(2, 2, 2, 2)).sum().backward()
    net[0].bias.requires_grad_(False)
    return net


def fingerprint(model):
    def bits(tensor):
        return None if tensor is None else (tensor.data_ptr(), tensor.dtype, tensor.detach().numpy().tobytes())

    return {
        "parameters": [(id(p), bits(p), id(p.grad), bits(p.grad), p.requires_grad) for p in model.parameters()],
        "buffers": [(name, id(b), bits(b)) for name, b in model.named_buffers()],
        "modes": [m.training for m in model.modules()],
        "momenta": [getattr(m, "momentum", None) for m in model.modules()],
        "rng": (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
    }


def disturb(model):
    model.train()
    model[1].momentum = 1.0
    model[1].running_mean = torch.ones(3)
    model[3].running_var.zero_()
    model[3].register_buffer("extra", torch.ones(1))
    model[0].bias.requires_grad_(True)
    model(torch.randn(2, 2, 2, 2)).sum().backward()
    random.random(), np.random.rand()


def test_everything_comes_back_bit_for_bit_also_after_an_interrupt(model):
    before = fingerprint(model)
    with preserved(model):
        assert all(parameter.grad is None for parameter in model.parameters())
        disturb(model)
        assert fingerprint(model) != before
    assert fingerprint(model) == before

    def interrupted():
        with preserved(model):
            disturb(model)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert fingerprint(model) == before


def test_an_untouched_buffer_is_not_written(model):
    model.eval()
    loss = model(torch.randn(2, 2, 2, 2, requires_grad=True)).sum()
    with preserved(model):
        model(torch.randn(2, 2, 2, 2))
    loss.backward()  # raises if a buffer it saved had been written


@pytest.mark.parametrize(
    "buffer",
    [
        pytest.param(torch.eye(3).to_sparse(), id="sparse"),
        pytest.param(torch.empty(2, device="meta"), id="meta"),
        pytest.param(torch.ones(2, dtype=torch.complex64), id="complex"),
        pytest.param(torch.tensor([True]), id="bool"),
    ],
)
def test_unusual_buffers_do_not_keep_the_rest_from_coming_back(model, buffer):
    before = fingerprint(model)
    model.register_buffer("unusual", buffer)
    with preserved(model):
        disturb(model)
    del model.unusual
    assert fingerprint(model) == before


def test_a_resized_or_cast_buffer_comes_back():
    layer = nn.BatchNorm1d(3)
    layer.register_buffer("cache", torch.arange(4.0))
    cache = layer.cache
    with preserved(layer):
        layer.cache.resize_(9).fill_(1)
        layer.running_mean.data = layer.running_mean.double() + 1
    assert layer.cache is cache
    assert layer.cache.tolist() == [0, 1, 2, 3]
    assert layer.running_mean.dtype == torch.float32


def test_one_restoration_that_fails_does_not_skip_the_others(model):
    before = fingerprint(model)

    class Stubborn(nn.Module):
        fails = False

        def __setattr__(self, name, value):
            if self.fails:
                raise KeyboardInterrupt
            super().__setattr__(name, value)

    stubborn = Stubborn()
    whole = nn.ModuleList([model, stubborn, nn.BatchNorm1d(2)])

    def borrow():
        with preserved(whole):
            disturb(model)
            whole[2].momentum = 0.9
            Stubborn.fails = True

    with pytest.raises(KeyboardInterrupt):
        borrow()
    assert whole[2].momentum == 0.1
    assert fingerprint(model) == before


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_buffer_is_refused_before_anything_is_touched(model):
    model.register_buffer("ragged", torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]))
    with pytest.raises(BatchNormError, match="buffer 'ragged' is nested"), preserved(model):
        pass
    assert model[0].weight.grad is not None


def test_a_lazy_module_is_refused_by_name():
    with (
        pytest.raises(BatchNormError, match=r"'0\.weight' is uninitialized.*forward pass first"),
        preserved(nn.Sequential(nn.LazyBatchNorm1d())),
    ):
        pass


def test_float64_is_lent_and_the_same_storage_handed_back(model):
    before = fingerprint(model)

    def interrupted():
        with in_float64(model):
            assert model[0].weight.dtype == model[1].running_var.dtype == torch.float64
            assert model[1].num_batches_tracked.dtype == torch.int64
            model[0].weight.data.zero_()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert fingerprint(model) == before


def test_out_of_inference_mode_makes_trainable_tensors():
    with torch.inference_mode():
        x = torch.ones(2)
        with out_of_inference_mode():
            assert not x.clone().is_inference()
            assert not torch.is_grad_enabled()


def test_rng_of_torch_numpy_and_python():
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    expected = (torch.rand(1).item(), np.random.rand(), random.random())
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    with preserved_rng(torch.device("cpu")):
        torch.rand(5), np.random.rand(5), random.random()
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected


def test_a_buffer_of_one_element_and_no_stride_is_compared_and_restored():
    module = nn.Module()
    module.register_buffer("count", torch.tensor(3).expand(1).clone())
    with preserved(module):
        module.count.add_(1)
    assert module.count.item() == 3


class Stateful(nn.Module):
    """Counts its calls, keeps its last input, and builds what it needs at the first call."""

    def __init__(self):
        super().__init__()
        self.calls, self.last = 0, None

    def forward(self, x):
        self.calls += 1
        self.last = x if self.last is None else self.last + x
        if not hasattr(self, "built"):
            self.register_buffer("grid", torch.ones(len(x)))
            self.built = True
        return self.last + self.grid[:, None]


@pytest.mark.parametrize("before", [[], [torch.ones(2, 3)]], ids=["fresh", "used"])
def test_what_a_forward_pass_keeps_in_attributes_comes_back(before):
    net = Stateful()
    for x in before:
        net(x)
    kept = dict(vars(net))
    with preserved(net):
        net(torch.ones(2, 3))
        net.last = torch.ones(4, 3)
        net.more = 1
    assert vars(net).keys() == kept.keys()
    assert all(vars(net)[name] is value for name, value in kept.items())
    assert net(torch.ones(2, 3)).shape == (2, 3)


class Building(nn.Module):
    """Makes layers and fills containers at its first call, as lazy code does."""

    def __init__(self):
        super().__init__()
        self.head, self.seen, self.cache, self.kinds = None, [], {}, set()

    def forward(self, x):
        if self.head is None:
            self.head = nn.Linear(x.shape[1], 2)
        if "offset" not in self._parameters:
            self.offset = nn.Parameter(torch.ones(len(x), 1))
        self.cache.setdefault("position", torch.arange(len(x))[:, None])
        self.seen.append(x)
        self.kinds.add(x.dtype)
        return self.head(x) + self.offset + self.cache["position"]


@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "used"])
def test_what_a_forward_pass_builds_or_collects_is_taken_back(warm):
    net, x = Building(), torch.ones(2, 3)
    if warm:
        net(x)
    kept = {name: value for name, value in vars(net).items()}
    held = [list(net.seen), dict(net.cache), set(net.kinds), dict(net._modules), dict(net._parameters)]
    with preserved(net):
        net(x if warm else torch.ones(4, 5))
        net.seen.append(1)
    assert vars(net).keys() == kept.keys()
    assert all(vars(net)[name] is value for name, value in kept.items())
    now = [list(net.seen), dict(net.cache), set(net.kinds), dict(net._modules), dict(net._parameters)]
    for before, after in zip(held, now, strict=True):
        assert len(before) == len(after)
        assert list(map(id, before)) == list(map(id, after))
    assert net(x).shape == (2, 2)
    assert isinstance(net.head, nn.Linear)


def test_parameters_that_code_writes_to_come_back(model):
    before = fingerprint(model)

    def write():
        with torch.no_grad():
            model[0].weight.add_(1)
            model[0].bias.data.zero_()  # which no version counts
            model[1].running_mean.add_(1)

    for error in (None, KeyboardInterrupt):
        with contextlib.suppress(KeyboardInterrupt), preserved(model), written_back(model):
            write()
            assert fingerprint(model)["parameters"] != before["parameters"]
            if error is not None:
                raise error
        assert fingerprint(model) == before


def test_each_run_can_find_the_same_network():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.register_buffer("queue", torch.zeros(3))
    model.register_buffer("nothing", None)
    weight = model[0].weight.detach().clone()
    with written_back(model) as put_back:
        for _ in range(2):
            put_back()
            assert torch.equal(model[0].weight, weight)
            assert torch.equal(model.queue, torch.zeros(3))
            loss = model(torch.ones(3, 2)).sum()
            with torch.no_grad():
                model[0].weight.add_(1)
                model.queue[1] = 5
        assert model[1].num_batches_tracked == 2, "BN layers are the borrower's matter"
    assert torch.equal(model[0].weight, weight)
    assert loss.grad_fn is not None
    model(torch.ones(3, 2)).sum().backward()
    with written_back(model) as put_back:
        loss = model(torch.ones(3, 2)).square().sum()
        with torch.no_grad():
            model[0].bias.add_(1)
        put_back()
        loss.backward()  # what is put back does not count as written


def test_tensors_in_attributes_move_along_and_come_back():
    class Metric(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.register_buffer("held", torch.zeros(1))
            self.state, self.states = torch.ones(2), [torch.ones(1), torch.ones(2)]
            self.defaults, self.pair = {"a": torch.zeros(1), "b": 3}, (torch.ones(1), "text")
            self.weights, self.buffers_held = [self.weight], [self.held]

    model = Metric()
    names = ("state", "states", "defaults", "pair", "weights", "buffers_held")
    before = {name: getattr(model, name) for name in names}
    with pytest.raises(RuntimeError, match="incompatible"), on_device(model, torch.device("meta")):
        pass
    fake = nn.Module()
    vars(fake).update({name: before[name] for name in names[:4]})
    with on_device(fake, torch.device("meta")):
        moved = [fake.state, *fake.states, fake.defaults["a"], fake.pair[0]]
        assert {tensor.device.type for tensor in moved} == {"meta"}
        assert (fake.defaults["b"], fake.pair[1]) == (3, "text")
    for owner, kept in ((fake, names[:4]), (model, names)):
        for name in kept:
            assert getattr(owner, name) is before[name]
    with on_device(model, torch.device("cpu")):
        assert all(getattr(model, name) is before[name] for name in names)


class Remembers(nn.Module):
    """Keeps what a training step of the usual kind keeps, and draws from generators of its own."""

    def __init__(self):
        super().__init__()
        self.outputs = {"train": [0.5], "val": []}
        self.window, self.by_key = deque([1.0, 2.0], maxlen=2), defaultdict(list)
        self.array, self.arrays = np.zeros(3), [np.ones(2)]
        self.rng, self.old_rng = np.random.default_rng(0), np.random.RandomState(0)
        self.python_rng, self.generator = random.Random(0), torch.Generator().manual_seed(0)
        self.cycle = [self.outputs]
        self.cycle.append(self.cycle)

    def forward(self, x):
        noise = self.rng.normal() + self.old_rng.normal() + self.python_rng.random()
        noise += float(torch.randn(1, generator=self.generator))
        self.outputs["train"].append(noise)
        self.outputs.setdefault("test", []).append(noise)
        self.window.append(noise)
        self.by_key["new"].append(noise)
        self.array[0] += noise
        self.arrays[0] *= 2
        return x + noise


def test_what_a_training_step_collects_and_draws_comes_back_in_the_very_objects():
    model = Remembers()

    def held():
        return [model.outputs, model.outputs["train"], model.window, model.by_key, model.array, model.arrays[0]]

    before = held()
    with preserved(model):
        first = model(torch.zeros(1))
        assert model.arrays[0][0] == 2
    assert all(one is other for one, other in zip(before, held(), strict=True))
    assert model.outputs == {"train": [0.5], "val": []}
    assert (list(model.window), model.window.maxlen, dict(model.by_key)) == ([1.0, 2.0], 2, {})
    assert model.by_key.default_factory is list
    assert (model.array.tolist(), model.arrays[0].tolist()) == ([0.0, 0.0, 0.0], [1.0, 1.0])
    assert torch.equal(model(torch.zeros(1)), first), "the generators begin where they began"
