"""Three processes with unequal data, against one process that has all of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

from bn_lightning.errors import RecalibrationError
from bn_lightning.layers import BatchRenorm, CrossReplicaBatchNorm
from bn_lightning.recalibration import population_statistics, recalibrate_batch_norm

WORLD = 3
SIZES = ([4, 9, 2, 7], [5], [])  # batches of each process; the last one has none


class Network(nn.Module):
    """BN of the kinds that do collectives in training among others, one called twice, one in one process only."""

    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.joint = CrossReplicaBatchNorm(3)
        self.renorm = BatchRenorm(3, r_warmup=None, d_warmup=None)
        self.sync = nn.SyncBatchNorm(3)
        self.seldom = nn.BatchNorm2d(3)
        self.unused = nn.BatchNorm1d(5)

    def forward(self, x):
        x = self.sync(self.renorm(self.joint(self.first(x)).relu()).sigmoid())
        return self.seldom(self.first(x)) if len(x) == 5 else self.first(x)


def build():
    source = torch.Generator().manual_seed(0)
    net = Network()
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=source).abs() + 0.1)
            else:
                tensor.fill_(7 if "tracked" in name else 0)
    return net


def data(rank):
    source = torch.Generator().manual_seed(10 + rank)
    return [10 * rank + torch.randn(size, 3, 4, 4, generator=source) for size in SIZES[rank]]


def told(measured):
    return {
        name: (layer.moments.count, layer.moments.mean, layer.moments.m2, layer.calls, layer.batches,
               layer.standard_error)
        for name, layer in measured.items()
    }  # fmt: skip


def refused(function, *arguments, **options):
    with pytest.raises(RecalibrationError) as caught:
        function(*arguments, **options)
    cause = caught.value.__cause__
    return str(caught.value), type(cause).__name__


def process(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    pair = distributed.new_group([0, 1])
    calls, original = [], distributed.all_reduce
    distributed.all_reduce = lambda *arguments, **options: calls.append(1) or original(*arguments, **options)
    found = {"whole": told(population_statistics(build(), data(rank)))}
    found["collectives"] = len(calls)
    found["pair"] = told(population_statistics(build(), data(rank), process_group=pair)) if rank < 2 else None
    net = build()
    result = recalibrate_batch_norm(net, data(rank))
    found["state"] = {key: value.clone() for key, value in net.state_dict().items()}
    found["result"] = result.to_dict()
    result.undo()
    found["undone"] = all(torch.equal(value, build().state_dict()[key]) for key, value in net.state_dict().items())

    def broken(model, batch):
        if rank == 0:
            raise OSError("the disk is gone")
        return model(batch)

    mine = build()
    if rank == 1:
        mine.renorm.eval()
    found["refused"] = {
        "forward": refused(population_statistics, build(), data(rank), forward=broken),
        "batches": refused(recalibrate_batch_norm, build(), 3 if rank == 2 else data(rank)),
        "layers": refused(recalibrate_batch_norm, build(), data(rank), include=["first"] if rank else ["joint"]),
        "frozen": refused(recalibrate_batch_norm, mine, data(rank)),
        "nothing": refused(recalibrate_batch_norm, build(), []),
        "single": refused(population_statistics, nn.BatchNorm1d(2), [torch.ones(2 - rank % 2, 2)]),
    }
    # One stops early and the others have little: nobody waits.
    many = [torch.randn(8, 3, 4, 4) for _ in range(40 if rank == 0 else rank)]
    found["early"] = recalibrate_batch_norm(build(), many, include=["first"], tolerance=10.0).to_dict()
    torch.save(found, os.path.join(folder, f"{rank}.pt"))
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    everyone = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    outputs = [running.communicate(timeout=120)[0] for running in everyone]
    assert [running.returncode for running in everyone] == [0] * WORLD, "\n".join(outputs)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def same(one, two):
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for name in one
        for a, b in zip(one[name], two[name], strict=True)
    )


@pytest.mark.parametrize(("key", "ranks"), [("whole", range(WORLD)), ("pair", range(2))], ids=["all", "group"])
def test_they_find_what_one_process_finds_in_all_of_the_data(found, key, ranks):
    expected = told(population_statistics(build(), [batch for rank in ranks for batch in data(rank)]))
    assert expected["first"][3:5] == (10, 5)
    assert expected["unused"][0] == 0
    for rank in ranks:
        measured = found[rank][key]
        assert same(measured, found[0][key])
        for name, (count, mean, m2, calls, batches, error) in expected.items():
            assert measured[name][0] == count
            assert measured[name][3:5] == (calls, batches)
            if count:
                torch.testing.assert_close(measured[name][1], mean, rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(measured[name][2], m2, rtol=1e-12, atol=1e-12)
            assert measured[name][5] == (None if error is None else pytest.approx(error, rel=1e-4))


def test_one_collective_moves_all_layers(found):
    assert [each["collectives"] for each in found] == [1] * WORLD


def test_recalibrated_networks_are_the_same_and_come_back(found):
    alone = build()
    recalibrate_batch_norm(alone, [batch for rank in range(WORLD) for batch in data(rank)])
    for each in found:
        assert each["undone"]
        assert each["result"] == found[0]["result"]
        for key, value in alone.state_dict().items():
            assert torch.equal(each["state"][key], found[0]["state"][key])
            torch.testing.assert_close(each["state"][key], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("case", "message", "causes"),
    [
        ("forward", "process 0 cannot measure population statistics: OSError: the disk is gone",
         ["OSError", None, None]),
        ("batches", "process 2 cannot measure population statistics: batches must be an iterable of batches",
         [None, None, "RecalibrationError"]),
        ("layers", "process 0 has 'joint' (3 channels), process 1 has 'first' (3 channels)", [None] * 3),
        ("frozen", "process 1 has 'renorm (frozen)' (3 channels)", [None] * 3),
        ("nothing", "batches gave no data", [None] * 3),
        ("single", "process 1 cannot measure population statistics: '' (BatchNorm1d) was given an input of shape (1,",
         [None, "SingleValueError", None]),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)  # fmt: skip
def test_what_is_wrong_in_one_is_told_by_all(found, case, message, causes):
    for each, cause in zip(found, causes, strict=True):
        text, kind = each["refused"][case]
        assert message in text
        assert kind == (cause or "NoneType")


def test_one_may_stop_early(found):
    assert [each["early"] for each in found] == [found[0]["early"]] * WORLD
    assert found[0]["early"]["stopped_early"] is True
    assert found[0]["early"]["batches"] == 20 + 1 + 2


if __name__ == "__main__":
    process(int(sys.argv[1]), sys.argv[2])
