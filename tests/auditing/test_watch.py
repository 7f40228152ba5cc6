"""The watch counts what forward hooks would count, from buffers alone."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bn_lightning.auditing import TrainingWatch, audit_batch_norm
from bn_lightning.layers import FrozenBatchNorm, GhostBatchNorm, convert_batch_norm


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm1d(3)
        self.again = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.odd = nn.BatchNorm1d(3)
        self.ghost = GhostBatchNorm(3, virtual_batch_size=2)
        self.untracked = nn.BatchNorm1d(3, track_running_stats=False)

    def forward(self, x, odd=False):
        x = self.first(x)
        x = checkpoint(self.again, x, use_reentrant=False) if self.training else self.again(x)
        x = self.ghost(self.untracked(x))
        return self.odd(self.odd(x)) if odd else x


class Plain(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, odd=False):
        return self.net(x)


def layers_of(net):
    return {name: module for name, module in net.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}


def data(index):
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(index), requires_grad=True)


def train(watch, net, batches):
    for index in batches:
        watch.begin_batch()
        loss = net(data(index), odd=index % 2 == 1).square().sum()
        watch.before_backward()
        loss.backward()
        watch.after_backward()
        watch.end_batch()


def test_updates_are_counted_a_batch_forward_backward_and_in_validation():
    torch.manual_seed(0)
    net = Net()
    watch, calls = TrainingWatch(layers_of(net)), []
    handles = [
        layer.register_forward_pre_hook(lambda module, args, name=name: calls.append((name, module.training)))
        for name, layer in layers_of(net).items()
    ]
    train(watch, net, range(6))
    for handle in handles:
        handle.remove()
    net.eval()
    net.first.train()
    watch.begin_validation()
    for index in range(2):
        watch.begin_validation_batch()
        net(data(index))
    watch.end_validation()
    net.train()
    history = watch.history()
    assert history.batches == 6
    seen = history.layers
    for name in ("first", "again.1", "odd", "ghost"):
        counted = sum(each == (name, True) for each in calls)
        assert (seen[name].forward_updates + seen[name].backward_updates) * 6 == counted
    assert (seen["again.1"].forward_updates, seen["again.1"].backward_updates) == (1.0, 1.0)
    assert (seen["odd"].forward_updates, seen["odd"].backward_updates) == (1.0, 0.0)
    assert {name: each.validation_updates for name, each in seen.items() if each.validation_updates} == {"first": 2}
    assert [name for name, each in seen.items() if each.validated_in_training_mode] == ["first"]
    assert {each.training_share for each in seen.values()} == {1.0}
    assert seen["untracked"].forward_updates is None
    assert "track_running_stats=False" in seen["untracked"].reason
    assert {name for name, each in seen.items() if each.reason} == {"untracked"}


def test_the_report_tells_of_what_layers_the_updates_are_unknown_and_why():
    net = nn.Sequential(nn.BatchNorm1d(3), *(nn.BatchNorm1d(3, track_running_stats=False) for _ in range(5)))
    watch = TrainingWatch(layers_of(net))
    train(watch, Plain(net), range(2))
    report = audit_batch_norm(net, history=watch.history(), exclude=["1"])
    told = [row for row in report.not_looked if "track_running_stats" in row.reason]
    assert [row.what for row in told] == ["updates while training of 2, 3, 4 and 1 more"]


def test_what_was_begun_and_not_ended_does_not_count():
    net = Net()
    watch = TrainingWatch(layers_of(net))
    train(watch, net, range(2))
    watch.begin_batch()
    net(data(2))
    train(watch, net, range(2, 4))
    history = watch.history()
    assert history.batches == 4
    assert history.layers["first"].forward_updates == 1.0


def test_runs_of_a_closure_are_not_extra_updates():
    net = Net()
    watch = TrainingWatch(layers_of(net))
    for index in range(3):
        watch.begin_batch()
        for _ in range(4):
            loss = net(data(index)).sum()
            watch.before_backward()
            loss.backward()
            watch.after_backward()
        watch.end_batch(runs=4)
    seen = watch.history().layers
    assert (seen["first"].forward_updates, seen["again.1"].backward_updates) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("batches", "reason"), [(0, "no training batch was watched"), (2, "no backward pass was watched")]
)
def test_what_cannot_be_known_is_unknown_with_the_reason(batches, reason):
    net = Net()
    watch = TrainingWatch(layers_of(net))
    for index in range(batches):
        watch.begin_batch()
        net(data(index)).sum().backward()
        watch.end_batch()
    seen = watch.history().layers["first"]
    assert seen.forward_updates is None
    assert seen.backward_updates is None
    assert reason in seen.reason


def test_modes_and_counters_that_are_bound_anew_are_followed():
    net = Net()
    watch = TrainingWatch(layers_of(net))
    train(watch, net, range(2))
    net.first.num_batches_tracked = torch.tensor(100)  # as averaging weights does
    net.first.reset_running_stats()
    convert_batch_norm(net, "frozen", include=["again.*"])
    net.odd = nn.BatchNorm1d(3).eval()
    watch.follow(layers_of(net))
    train(watch, net, range(2))
    del net.ghost
    watch.follow(layers_of(net))
    seen = watch.history().layers
    assert isinstance(net.again[1], FrozenBatchNorm)
    assert seen["first"].forward_updates == 1.0
    assert (seen["again.1"].forward_updates, seen["again.1"].backward_updates) == (0.5, 0.5)
    assert seen["odd"].training_share == 0.5
    assert seen["ghost"].reason == "it has left the network"


def test_the_layers_keep_their_bits_and_nothing_is_attached():
    net, twin = Net(), Net()
    twin.load_state_dict(net.state_dict())
    watch = TrainingWatch(layers_of(net))
    train(watch, net, range(3))
    watch.look_across_processes()
    watch.history()
    for index in range(3):
        twin(data(index), odd=index % 2 == 1).square().sum().backward()
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_a_network_without_counters_is_watched_for_its_modes():
    net = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False))
    watch = TrainingWatch(layers_of(net))
    watch.begin_batch()
    watch.end_batch()
    assert watch.history().layers["0"].training_share == 1.0


def test_updates_between_batches_are_counted_and_those_of_validation_are_not():
    net = nn.Sequential(nn.BatchNorm1d(3))
    watch = TrainingWatch(layers_of(net))
    net(data(0))  # before the first batch, such as a sanity check
    train(watch, Plain(net), range(2))
    net(data(1))
    net(data(2))
    watch.begin_validation()
    net(data(3))
    watch.end_validation()
    net(data(4))
    train(watch, Plain(net), range(2))
    net(data(5))
    watch.end_training()
    net(data(6))
    watch.end_training()
    seen = watch.history().layers["0"]
    assert (seen.forward_updates, seen.validation_updates, seen.between_updates) == (1.0, 1, 4)


def test_counters_that_are_set_back_or_belong_to_a_new_layer_are_no_updates_between_batches():
    net = nn.Sequential(nn.BatchNorm1d(3))
    watch = TrainingWatch(layers_of(net))
    train(watch, Plain(net), range(3))
    net[0].reset_running_stats()
    train(watch, Plain(net), range(1))
    net[0] = nn.BatchNorm1d(3)
    net[0].num_batches_tracked.fill_(1000)
    watch.follow(layers_of(net))
    train(watch, Plain(net), range(1))
    assert watch.history().layers["0"].between_updates == 0
