"""Domain BN: checkpoints and plain layers start every domain, files keep them, and one of them can be shipped."""

import copy
import io

import pytest
import torch
from layers.domain_layers import assert_same, batch, build, of_domain, randomize, state
from torch import nn

from bn_lightning import convert_batch_norm, select_domain, use_domain
from bn_lightning.errors import ConversionError
from bn_lightning.layers.domain import DomainBatchNorm
from bn_lightning.preservation import preserved

# --- Starting from plain ones


@pytest.mark.parametrize("own", [False, True], ids=["shared", "per_domain_affine"])
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_a_plain_checkpoint_starts_every_domain(assign, own):
    plain = randomize(nn.BatchNorm1d(3))
    layer, file, values = build(seed=5, dtype=torch.float32, per_domain_affine=own), plain.state_dict(), state(plain)
    layer.load_state_dict(file, strict=True, assign=assign)
    assert_same(file, values)
    for domain in range(3):
        assert_same(of_domain(layer, domain), values)
    with use_domain(layer, 1):  # what was loaded is memory of its own
        layer(batch(dtype=torch.float32))
    for domain in (0, 2):
        assert_same(of_domain(layer, domain), values)


def test_a_plain_checkpoint_of_a_whole_network_loads_strictly():
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3)))
    file = randomize(copy.deepcopy(net)).state_dict()
    convert_batch_norm(net, "domain", num_domains=3)
    assert [tensor.stride() for tensor in (net[1].other_running_mean, net[1].other_num_batches_tracked)] == [
        (3, 1),
        (1,),
    ]
    net.load_state_dict(file)
    assert torch.equal(net[2][0].other_running_var, file["2.0.running_var"].expand(2, 3))


def test_a_file_from_before_there_was_a_count_loads():
    file = dict(randomize(nn.BatchNorm1d(3)).state_dict())
    del file["num_batches_tracked"]  # nor has a plain dict a version
    layer = build(dtype=torch.float32)
    counts = layer.other_num_batches_tracked.clone()
    layer.load_state_dict(file)
    assert torch.equal(layer.other_num_batches_tracked, counts)


def test_a_domain_checkpoint_goes_round_and_a_broken_one_does_not():
    layer, other = build(per_domain_affine=True), build(seed=7, per_domain_affine=True)
    other.load_state_dict(layer.state_dict())
    assert_same(state(other), state(layer))
    shared = build(seed=9)
    other.load_state_dict(shared.state_dict())  # statistics from the file, scale and shift from domain 0
    assert torch.equal(other.other_running_mean, shared.other_running_mean)
    assert torch.equal(other.other_weight_2, shared.weight)
    broken = layer.state_dict()
    del broken["other_running_var"]
    with pytest.raises(RuntimeError, match=r"Missing key.*other_running_var"):
        other.load_state_dict(broken)
    with pytest.raises(RuntimeError, match="size mismatch for other_running_mean"):
        build(num_domains=4).load_state_dict(shared.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for running_mean"):
        other.load_state_dict(nn.BatchNorm1d(5).state_dict())


@pytest.mark.parametrize("own", [False, True], ids=["shared", "per_domain_affine"])
def test_conversion_starts_every_domain_and_is_undone(own):
    plain = randomize(nn.BatchNorm2d(3, dtype=torch.float64))
    plain.bias.requires_grad_(False)
    before, parameters = state(plain), dict(plain.named_parameters())
    net = nn.Sequential(plain)
    report = convert_batch_norm(net, "domain", num_domains=3, per_domain_affine=own)
    for domain in range(3):
        assert_same(of_domain(plain, domain), before)
    assert all(parameter is dict(plain.named_parameters())[name] for name, parameter in parameters.items())
    assert all(parameter.requires_grad == ("bias" not in name) for name, parameter in plain.named_parameters())
    with use_domain(net, 2):
        net(batch((4, 3, 2, 2)))
    moved, held = state(plain), plain.state_dict(keep_vars=True)
    convert_batch_norm(net, "domain", num_domains=3, per_domain_affine=own)
    plain.configure(num_domains=3, per_domain_affine=own)
    assert_same(state(plain), moved)
    assert all(tensor is held[key] for key, tensor in plain.state_dict(keep_vars=True).items())
    report.undo()
    assert type(plain) is nn.BatchNorm2d
    assert_same(state(plain), before)


def test_more_domains_later_keep_those_there_are():
    layer = build(num_domains=3, per_domain_affine=True)
    kept, weight = [of_domain(layer, domain) for domain in range(3)], layer.other_weight_2
    layer.configure(num_domains=5, per_domain_affine=True)
    for domain, expected in enumerate([*kept, kept[0], kept[0]]):
        assert_same(of_domain(layer, domain), expected)
    assert layer.other_weight_2 is weight
    layer.configure(num_domains=2, per_domain_affine=False)
    assert layer.other_running_mean.shape == (1, 3)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]


# --- Leaving


@pytest.mark.parametrize("own", [False, True], ids=["shared", "per_domain_affine"])
@pytest.mark.parametrize("domain", [0, 1, 2])
def test_a_selected_domain_is_plain_batch_norm(domain, own):
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3))).double()
    fresh, seen = copy.deepcopy(net), []
    convert_batch_norm(net, "domain", num_domains=3, per_domain_affine=own)
    randomize(net)
    net[1].register_forward_hook(lambda *_: seen.append(1))
    parameters = [*net[0].parameters(), net[1].weight, net[1].bias, net[2][0].weight, net[2][0].bias]
    expected = {key: value.clone() for key, value in of_domain(net[1], domain).items()}
    with use_domain(net.eval(), domain):
        y = net(batch((4, 3, 2, 2)))
    report = select_domain(net, domain)
    assert [row.after for row in report.rows] == ["BatchNorm2d", "BatchNorm2d"]
    assert type(net[1]) is nn.BatchNorm2d
    assert net[1].__dict__.keys() == fresh[1].__dict__.keys()
    assert [id(parameter) for parameter in net.parameters()] == [id(parameter) for parameter in parameters]
    assert_same(state(net[1]), expected)
    assert torch.equal(net(batch((4, 3, 2, 2))), y)
    assert len(seen) == 2
    fresh.load_state_dict(net.state_dict(), strict=True)


def test_a_layer_built_as_such_needs_to_be_told_its_plain_class():
    net = nn.Sequential(build(dtype=torch.float32), build(dtype=torch.float32))
    net[1].converted_from = nn.BatchNorm1d
    before = state(net)
    with pytest.raises(ConversionError, match=r"'0' cannot be converted: .*Pass plain_class=, torch\.nn\.BatchNorm2d"):
        select_domain(net, 1)
    for wrong in (nn.LayerNorm, DomainBatchNorm, "BatchNorm2d"):
        with pytest.raises(ConversionError, match="takes a plain BatchNorm"):
            select_domain(net, 1, wrong)
    with pytest.raises(ConversionError, match=r"'0' cannot be converted: there is no domain 3"):
        select_domain(net, 3, nn.BatchNorm2d)
    assert_same(state(net), before)
    assert [type(layer) for layer in net] == [DomainBatchNorm] * 2
    report = select_domain(net, 1, nn.BatchNorm2d)
    assert [type(layer) for layer in net] == [nn.BatchNorm2d, nn.BatchNorm1d]
    report.undo()
    assert_same(state(net), before)
    with pytest.raises(ConversionError, match="ReLU has no DomainBatchNorm"):
        select_domain(nn.ReLU(), 0)


def test_a_selected_sync_batch_norm_runs():
    layer = build()
    layer.select(1, nn.SyncBatchNorm)
    assert layer.eval()(batch()).shape == (6, 3, 4)
    assert layer.process_group is None


def test_a_layer_with_others_inside_does_not_lose_them():
    layer = build()
    layer.act = nn.ReLU()
    with pytest.raises(ConversionError, match="holds act, which BatchNorm2d would not run"):
        layer.select(0, nn.BatchNorm2d)


# --- Keeping and moving


@pytest.mark.parametrize("own", [False, True], ids=["shared", "per_domain_affine"])
def test_copies_files_and_dtypes(own):
    layer = build(per_domain_affine=own)
    net = nn.Sequential(layer)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    copies = copy.deepcopy(net), torch.load(file, weights_only=False)
    results = []
    for each in (net, *copies):
        with use_domain(each, 2):
            results.append(each(batch()))
    for each, y in zip(copies, results[1:], strict=True):
        assert_same(state(each), state(net))
        assert torch.equal(y, results[0])
    net.to(torch.float32)
    assert {value.dtype for value in net.state_dict().values()} == {torch.float32, torch.long}
    with use_domain(net, 1):
        assert net(batch(dtype=torch.bfloat16)).dtype == torch.bfloat16
    net.to("meta")
    assert {value.device.type for value in net.state_dict().values()} == {"meta"}


def test_reset_reaches_every_domain():
    layer = build(per_domain_affine=True)
    layer.reset_parameters()
    fresh = DomainBatchNorm(3, num_domains=3, per_domain_affine=True, dtype=torch.float64)
    assert_same(state(layer), state(fresh))


@pytest.mark.parametrize("momentum", [0.1, None], ids="momentum={}".format)
def test_an_empty_batch_leaves_statistics_alone(momentum):
    layer = build(momentum=momentum)
    before = state(layer)
    with use_domain(layer, 1):
        assert layer(batch((0, 3, 4))).shape == (0, 3, 4)
    assert_same(state(layer), before, but=["other_num_batches_tracked"])  # torch counts it too


def test_buffers_of_the_single_other_domain_can_be_set_aside_and_put_back():
    layer = build(num_domains=2)
    plain = nn.BatchNorm1d(3, dtype=torch.float64)
    convert_batch_norm(plain, "domain")
    for each in (layer, plain):
        before = state(each)
        with preserved(each), use_domain(each, 1):
            each(batch())
            assert not torch.equal(each.other_running_mean, before["other_running_mean"])
        assert_same(state(each), before)


def test_update_bn_measures_the_domain_at_hand_alone():
    layer = build(dtype=torch.float32)
    randomize(layer)
    before = state(layer)
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(0)) + 2
    with use_domain(layer, 1):
        torch.optim.swa_utils.update_bn([x], layer)
    torch.testing.assert_close(layer.other_running_mean[0], x.mean(0))
    assert torch.equal(layer.other_running_mean[1:], before["other_running_mean"][1:])
    assert torch.equal(layer.running_mean, before["running_mean"])
