"""Three processes with running statistics of their own, against NumPy over all of them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from torch import distributed, nn

import bn_lightning as bnl
from bn_lightning.errors import BatchNormError
from bn_lightning.layers import CrossReplicaBatchNorm, DomainBatchNorm, MergedLayer, statistics_spread
from bn_lightning.selection import named_batch_norms

WORLD = 3
FRESH = 1  # the process that has not seen a batch


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.BatchNorm2d(4)
        self.body = nn.Sequential(nn.Linear(2, 2), CrossReplicaBatchNorm(3, affine="scale"), nn.BatchNorm1d(2))
        self.untracked = nn.BatchNorm1d(2, track_running_stats=False)
        self.double = nn.BatchNorm1d(3, dtype=torch.float64)
        self.low = nn.BatchNorm1d(3, dtype=torch.bfloat16)
        self.uncounted = nn.BatchNorm1d(3)
        self.unused = nn.BatchNorm1d(3)
        self.domains = DomainBatchNorm(2, num_domains=3)


def build(rank, offset=0.0):
    """A network as one process has it after some training."""
    net = Network()
    source = torch.Generator().manual_seed(rank)
    with torch.no_grad():
        net.body[1].weight.copy_(torch.tensor([1.0, 2.0, 0.0]))
        for name, buffer in net.named_buffers():
            if name.startswith("unused") or (rank == FRESH and name.startswith(("stem", "body.1"))):
                continue
            if not buffer.is_floating_point():
                buffer.fill_(0 if name.startswith("uncounted") else 10 + rank)
            elif "mean" in name:
                buffer.copy_(offset + torch.randn(buffer.shape, generator=source))
            else:
                buffer.copy_((0.01 if offset else 1) * (0.1 + torch.rand(buffer.shape, generator=source)))
        # Domain 2 was seen by one process only.
        if rank != 2:
            net.domains.other_running_mean[1] = 0
            net.domains.other_running_var[1] = 1
            net.domains.other_num_batches_tracked[1] = 0
    return net


def copies(net):
    return {name: buffer.clone() for name, buffer in net.named_buffers()}


def merged(net, calls, **options):
    """The buffers before, after, and after undo, with the result's rows; the buffers are still the same tensors."""
    before, tensors = copies(net), dict(net.named_buffers())
    calls.clear()
    result = bnl.merge_statistics(net, **options)
    number, after = len(calls), copies(net)
    rows = [row.to_dict() for row in result.rows]
    again = bnl.merge_statistics(net, **options)
    repeated = copies(net)
    again.undo()
    result.undo()
    kept = all(tensors[name] is buffer for name, buffer in net.named_buffers())
    return {
        "before": before,
        "after": after,
        "repeated": repeated,
        "undone": copies(net),
        "rows": rows,
        "text": str(result),
        "collectives": number,
        "kept": kept,
    }


def compared(net, **options):
    """The spread of every layer, and whether the buffers stayed as they were."""
    before = copies(net)
    spread = statistics_spread(named_batch_norms(net), **options)
    same = [torch.equal(before[name].nan_to_num(7.0), buffer.nan_to_num(7.0)) for name, buffer in net.named_buffers()]
    return spread, all(same)


def refused(net, **options):
    before = copies(net)
    with pytest.raises(BatchNormError) as caught:
        bnl.merge_statistics(net, **options)
    assert all(torch.equal(before[name], buffer) for name, buffer in net.named_buffers())
    return str(caught.value)


def process(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    pair = distributed.new_group([0, 2])
    calls, original = [], distributed.all_reduce
    distributed.all_reduce = lambda *arguments, **options: calls.append(1) or original(*arguments, **options)
    wrapped = nn.DataParallel(Network())
    wrapped.module.load_state_dict(build(rank).state_dict())
    broken = build(rank)
    if rank == 2:
        broken.stem.running_var[1] = torch.inf
    half = build(rank)
    if rank == 1:
        half.uncounted.running_mean[0] = torch.nan
    found = {
        "whole": merged(build(rank), calls),
        "large mean": merged(build(rank, 1e4), calls),
        "wrapped": merged(wrapped, calls),
        "some": merged(build(rank), calls, include=["body.*", "double"], exclude=["body.2"]),
        "pair": merged(build(rank), calls, process_group=pair),
        "nothing": merged(nn.BatchNorm1d(2, track_running_stats=False), calls),
        "other layers": refused(build(rank) if rank < 2 else nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))),
        "fewer layers": refused(nn.Sequential(*[nn.BatchNorm1d(2) for _ in range(1 if rank == 1 else 2)])),
        "other widths": refused(nn.BatchNorm1d(2 + rank)),
        "one at fault": refused(build(rank), include=["stemm"] if rank == 1 else ["stem"]),
        "not finite": refused(broken),
        "spread": compared(build(rank)),
        "spread not finite": compared(half),
    }
    torch.save(found, os.path.join(folder, f"{rank}.pt"))
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each process found."""
    folder = tmp_path_factory.mktemp("processes")
    # This file is the program of all processes: pytest's import mode leaves no module for `spawn` to import.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    program = [sys.executable, __file__]
    running = [subprocess.Popen([*program, str(rank), str(folder)], env=environment) for rank in range(WORLD)]
    try:
        assert [one.wait(timeout=120) for one in running] == [0] * WORLD
    finally:
        for one in running:  # where one fails, the others wait for it
            one.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def check(before, after, prefix, ranks, everyone, *, row=None):
    """Compare one layer's merged buffers with the reference over the processes that count."""

    def of(buffers, what):
        value = buffers[prefix + what]
        return (value if row is None else value[row]).double().numpy()

    mean, var = reference.merged(*([of(before[rank], f"running_{what}") for rank in ranks] for what in ("mean", "var")))
    dtype = after[prefix + "running_mean"].dtype
    rtol = {torch.float64: 1e-14, torch.float32: 2e-7, torch.bfloat16: 4e-3}[dtype]
    np.testing.assert_allclose(of(after, "running_mean"), mean, rtol=rtol)
    np.testing.assert_allclose(of(after, "running_var"), var, rtol=rtol)
    count = max(of(before[rank], "num_batches_tracked") for rank in everyone)
    assert of(after, "num_batches_tracked") == count


@pytest.mark.parametrize("name", ["whole", "large mean", "wrapped"])
def test_total_variance_over_the_processes_that_have_statistics(found, name):
    before = [one[name]["before"] for one in found]
    prefix = "module." if name == "wrapped" else ""
    for one in found:
        after = one[name]["after"]
        for layer in ("body.2.", "double.", "low.", "uncounted.", "domains."):
            check(before, after, prefix + layer, [0, 1, 2], [0, 1, 2])
        for layer in ("stem.", "body.1."):
            check(before, after, prefix + layer, [0, 2], [0, 1, 2])
        check(before, after, prefix + "domains.other_", [0, 1, 2], [0, 1, 2], row=0)
        check(before, after, prefix + "domains.other_", [2], [0, 1, 2], row=1)
        for what in ("running_mean", "running_var", "num_batches_tracked"):
            key = f"{prefix}unused.{what}"
            assert torch.equal(after[key], before[0][key])


@pytest.mark.parametrize("name", ["whole", "large mean", "wrapped", "some"])
def test_all_processes_end_with_the_same_bits_and_rows(found, name):
    chosen = ("body.1", "double") if name == "some" else ""
    for key, value in found[0][name]["after"].items():
        if key.startswith(chosen):
            assert all(torch.equal(one[name]["after"][key], value) for one in found), key
    assert all(one[name]["rows"] == found[0][name]["rows"] for one in found)
    assert all(one[name]["collectives"] == 1 for one in found)


@pytest.mark.parametrize("name", ["whole", "large mean", "wrapped", "some", "pair"])
def test_undo_restores_the_bits_and_merging_twice_changes_nothing(found, name):
    for one in found:
        assert all(torch.equal(one[name]["undone"][key], value) for key, value in one[name]["before"].items())
        assert all(torch.equal(one[name]["repeated"][key], value) for key, value in one[name]["after"].items())
        assert one[name]["kept"]


def test_rows_say_what_became_of_every_layer(found):
    rows = {row["name"]: row for row in found[0]["whole"]["rows"]}
    assert list(rows) == [
        *("stem", "body.1", "body.2", "untracked", "double", "low", "uncounted", "unused"),
        *("domains", "domains (domain 1)", "domains (domain 2)"),
    ]
    assert {name: row["processes"] for name, row in rows.items() if row["reason"] is None} == {
        **{"stem": 2, "body.1": 2, "body.2": 3, "double": 3, "low": 3, "uncounted": 3},
        **{"domains": 3, "domains (domain 1)": 3, "domains (domain 2)": 1},
    }
    assert "track_running_stats=False" in rows["untracked"]["reason"]
    assert rows["unused"]["reason"] == "no process has taken statistics yet"
    assert rows["domains (domain 2)"]["gap"] == 0
    assert "merged the running statistics of 9 of 11 BatchNorm layers over 3 processes" in found[0]["whole"]["text"]


def test_a_network_without_running_statistics_is_left_alone(found):
    for one in found:
        assert one["nothing"]["collectives"] == 0
        assert "track_running_stats=False" in one["nothing"]["rows"][0]["reason"]


def test_the_gap_is_the_farthest_process_by_the_formula(found):
    before, after = [found[rank]["whole"]["before"] for rank in (0, 2)], found[0]["whole"]["after"]
    mean, var = (after[f"body.1.running_{what}"].double().numpy() for what in ("mean", "var"))
    weight, gaps = np.array([1.0, 2.0, 0.0]), []
    for one in before:
        own_mean, own_var = (one[f"body.1.running_{what}"].double().numpy() for what in ("mean", "var"))
        r = np.sqrt((var + 1e-5) / (own_var + 1e-5))
        d = (mean - own_mean) / np.sqrt(var + 1e-5)
        channels = (r - 1) ** 2 * var / (var + 1e-5) + r**2 * d**2
        gaps.append(np.sqrt((weight**2 * channels).sum() / (weight**2).sum()))
    row = next(row for row in found[0]["whole"]["rows"] if row["name"] == "body.1")
    np.testing.assert_allclose(row["gap"], max(gaps), rtol=1e-5)


def test_the_spread_is_the_gap_merging_would_tell_with_nothing_written(found):
    expected: dict[str, float] = {}
    for row in found[0]["whole"]["rows"]:
        if row["gap"] is not None:
            name = row["name"].split(" (")[0]
            expected[name] = max(row["gap"], expected.get(name, 0.0))
    for one in found:
        spread, untouched = one["spread"]
        assert spread == expected
        assert untouched
        assert one["spread not finite"] == ({name: gap for name, gap in expected.items() if name != "uncounted"}, True)


def test_patterns_leave_the_other_layers_alone(found):
    for one in found:
        changed = {
            key.rpartition(".")[0]
            for key, value in one["some"]["after"].items()
            if not torch.equal(value, one["some"]["before"][key])
        }
        assert changed == {"body.1", "double"}


def test_a_group_leaves_the_process_outside_alone(found):
    before = [one["pair"]["before"] for one in found]
    for rank in (0, 2):
        check(before, found[rank]["pair"]["after"], "body.2.", [0, 2], [0, 2])
    assert all(torch.equal(found[1]["pair"]["after"][key], value) for key, value in before[1].items())
    assert all(row["reason"] for row in found[1]["pair"]["rows"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other layers", "process 0 has 'stem' (4 channels), process 2 has '0' (2 channels)"),
        ("fewer layers", "process 0 has '1' (2 channels), process 1 has no more than 1 layers"),
        ("other widths", "process 0 has '(root)' (2 channels), process 1 has '(root)' (3 channels)"),
        ("one at fault", "process 1 cannot merge its running statistics: include pattern 'stemm' matches none"),
        ("not finite", "the running statistics of 'stem' are not finite in process 2"),
    ],
)
def test_all_processes_refuse_together(found, name, message):
    for one in found:
        assert message in one[name]


def test_without_other_processes_nothing_changes():
    net = build(0)
    before = copies(net)
    result = bnl.merge_statistics(net, include=["body.*", "untracked"])
    assert result.processes == 1
    assert [row.reason for row in result.rows[:2]] == ["there is no other process"] * 2
    assert "track_running_stats=False" in result.rows[2].reason
    assert [row.processes for row in result.rows] == [1, 1, 0]
    result.undo()
    assert all(torch.equal(before[name], buffer) for name, buffer in net.named_buffers())
    assert result.to_dict()["layers"][0] == MergedLayer("body.1", 1, None, "there is no other process").to_dict()
    assert "<table>" in result._repr_html_()


def test_faults_are_raised_without_other_processes_too():
    with pytest.raises(BatchNormError, match="has no BatchNorm layer"):
        bnl.merge_statistics(nn.Linear(2, 2))


if __name__ == "__main__":
    process(int(sys.argv[1]), sys.argv[2])
