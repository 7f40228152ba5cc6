"""The audited model, its gradients, its optimizer and the random state come back bit for bit, wherever it stops."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bn_lightning.auditing import audit_batch_norm
from bn_lightning.layers import convert_batch_norm


class Tiny(nn.Module):
    """A frozen BatchNorm, one that is called twice, and one that draws random numbers; a counter that forward moves."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.BatchNorm1d(3)
        self.shared = nn.BatchNorm1d(3)
        self.noisy = nn.BatchNorm1d(3)
        self.dropout = nn.Dropout()
        self.head = nn.Linear(3, 2)
        self.register_buffer("steps", torch.zeros(()))
        self.seen = []

    def forward(self, x):
        self.steps.add_(1)
        self.seen.append(len(x))
        x = torch.tanh(self.shared(self.frozen(x)))
        return self.head(self.noisy(self.dropout(self.shared(x))))


class Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, tick):
        ctx.tick = tick
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.tick()
        return gradient, None


def subject():
    torch.manual_seed(0)
    model = Tiny()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not name.endswith("tracked"):
                tensor.copy_(torch.rand(tensor.shape) + 0.5)
    convert_batch_norm(model, "noisy", include=("noisy",))
    model.train().frozen.eval()
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(6, 3)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def data(number):
    source = torch.Generator().manual_seed(number)
    return [(1 + torch.randn(3, generator=source), torch.randint(2, (), generator=source)) for _ in range(number)]


def fingerprint(model, optimizer):
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        [
            (module.training, getattr(module, "momentum", None), [len(getattr(module, name)) for name in hooks])
            for module in model.modules()
        ],
        [
            # The forward pass writes the one and a step of ours the other, which their versions count.
            (
                id(tensor),
                tensor.requires_grad,
                tensor.detach().numpy().tobytes(),
                None if tensor is model.steps or tensor is model.head.bias else tensor._version,
            )
            for tensor in (*model.parameters(), *model.buffers())
        ],
        (id(model.seen), list(model.seen)),
        [(id(p.grad), p.grad.numpy().tobytes()) for p in model.parameters()],
        [value.numpy().tobytes() for state in optimizer.state.values() for value in state.values()],
        optimizer.param_groups[0]["lr"],
        torch.get_rng_state().numpy().tobytes(),
        str(np.random.get_state()),
        random.getstate(),
        (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    )


@pytest.mark.parametrize("way", ["loss", "step"])
@pytest.mark.parametrize("kind", [ArithmeticError, KeyboardInterrupt], ids=lambda kind: kind.__name__)
def test_breaking_off_at_every_call_in_turn_leaves_no_trace(kind, way):
    model, optimizer = subject()
    # They shuffle by the global random state.
    train = torch.utils.data.DataLoader(data(8), batch_size=4, shuffle=True)
    val = torch.utils.data.DataLoader(data(5), batch_size=5, shuffle=True)
    calls, stop, at = [0], [0], [""]

    def tick(where="", *_):
        calls[0] += 1
        if calls[0] == stop[0]:
            at[0] = where
            torch.rand(3), np.random.rand(), random.random()  # drawn before the failure, and they go back too
            raise kind("cut")

    def loss(output, target):
        tick("loss")
        return Cut.apply(F.cross_entropy(output, target), lambda: tick("backward"))

    def step(network, batch):
        with torch.no_grad():
            network.head.bias.add_(0.1)  # a step may write to the network
        return loss(network(batch[0]), batch[1])

    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: tick("before"))
        module.register_forward_hook(lambda *_: tick("after"))
    options = {"val_batches": val, "optimizer": optimizer, way: loss if way == "loss" else step}
    before = fingerprint(model, optimizer)
    report = audit_batch_norm(model, train, **options)
    assert fingerprint(model, optimizer) == before
    assert sum(row.confirmed_loss_change is not None for row in report.layers) == 2
    # One recorded pass, two training batches, five passes over the evaluation batch, and two layers confirmed.
    passes, of_one = 1 + 2 + 5 + 2, 2 * 7
    losses = 5 + 2 + (2 if way == "step" else 0)
    total = passes * of_one + losses + 1
    assert calls[0] == total
    places = set()
    for stop[0] in range(1, total + 1):
        calls[0] = 0
        if stop[0] <= of_one and kind is ArithmeticError:  # an audit goes on without a recorded pass, and says so
            partial = audit_batch_norm(model, train, **options)
            assert [each.reason for each in partial.not_looked if "cut" in each.reason]
        else:
            with pytest.raises(kind, match="cut"):
                audit_batch_norm(model, train, **options)
        places.add(at[0])
        assert fingerprint(model, optimizer) == before, (stop[0], at[0])
    assert places == {"before", "after", "loss", "backward"}


@pytest.mark.parametrize("kind", [ArithmeticError, KeyboardInterrupt], ids=lambda kind: kind.__name__)
def test_breaking_off_while_batches_are_drawn_leaves_no_trace(kind):
    model, optimizer = subject()
    before = fingerprint(model, optimizer)

    def batches():
        yield (torch.randn(4, 3), torch.zeros(4, dtype=torch.long))
        np.random.rand()
        raise kind("cut")

    with pytest.raises(kind, match="cut"):
        audit_batch_norm(model, batches(), loss=F.cross_entropy)
    assert fingerprint(model, optimizer) == before


def test_rules_that_look_leave_no_trace_either():
    """What a layer draws where it is compared with float64."""
    model, optimizer = subject()
    before = fingerprint(model, optimizer)
    with torch.inference_mode():
        audit_batch_norm(model, torch.utils.data.DataLoader(data(8), batch_size=4), loss=F.cross_entropy)
    assert fingerprint(model, optimizer) == before


def test_a_run_after_an_audit_draws_what_it_would_have():
    """Also on a device that was not used before: seeds are set where they are put back, and nowhere else."""
    torch.manual_seed(3)
    seeded = []
    original = torch.cuda.manual_seed_all
    torch.cuda.manual_seed_all = lambda seed: seeded.append(seed)
    try:
        model, _ = subject()
        expected = torch.Generator()
        expected.set_state(torch.get_rng_state())
        seeded.clear()
        audit_batch_norm(model, torch.utils.data.DataLoader(data(8), batch_size=4), loss=F.cross_entropy)
    finally:
        torch.cuda.manual_seed_all = original
    assert seeded == []
    assert torch.equal(torch.rand(4), torch.rand(4, generator=expected))
