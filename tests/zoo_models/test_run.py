"""The whole-zoo run can fail: what is wrong with a network is found, told and resumed from."""

import multiprocessing
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from zoo import workers as workers_module
from zoo.architectures import Architecture
from zoo.outputs import outputs, relative_error, unfit
from zoo.rows import FoldingRow, Journal, PeerRow
from zoo.targets import missed, share_missed
from zoo.workers import measured
from zoo_models import odd_worker

from bn_lightning.folding import FoldReport, FoldResult, settle
from bn_lightning.folding.numbers import Numbers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch.fx's fuse imports what torch itself calls deprecated
    from zoo import measure as measure_module
    from zoo.measure import measure_folding

SMALL = Architecture("timm:test_byobnet", "timm", "byobnet", 460_000, 14, (3, 96, 96))
GOOD = FoldingRow(
    "timm:resnet18", calls={"folded-backward": 19, "kept": 1}, reported=1e-14, error=1e-14, native=1.1, undone=True
)


def test_nothing_is_missed_by_a_right_fold():
    assert list(missed(GOOD)) == []
    row = measure_folding(SMALL)
    assert list(missed(row)) == []
    assert (row.folded, row.total, row.left, row.crash) == (14, 14, 0, "")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"crash": "IndexError"}, "crashed: IndexError"),
        ({"error": 1.1e-9}, "wrong: float64 error"),
        ({"reported": float("nan")}, "wrong: float64 error"),
        ({"error": float("inf")}, "wrong: float64 error"),
        ({"native": 2.1}, "2.10 times as far off"),
        ({"native": float("nan")}, "times as far off"),
        ({"left": 1}, "1 layers left"),
        ({"undone": False}, "undo did not restore"),
        ({"kept": {"unverified": 2}}, "2 calls were planned to fold and rolled back"),
        ({"problem": "an output to compare is empty"}, "an output to compare is empty"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_every_fault_is_told(fault, words):
    (told,) = missed(replace(GOOD, **fault))
    assert words in told


def test_the_share_is_of_calls_over_all_networks():
    few = replace(GOOD, calls={"folded-backward": 80, "kept": 20})
    assert list(share_missed([GOOD])) == []
    assert "only 82.50 % of 120 calls" in next(iter(share_missed([GOOD, few])))
    assert list(share_missed([replace(GOOD, calls={"merged": 92, "affine": 8})])) == []
    assert list(share_missed([replace(GOOD, calls={"merged": 91, "affine": 9})]))


def test_a_wrong_fold_is_found_that_the_library_lets_pass(monkeypatch):
    right = Numbers.apply

    def wrong(numbers, step):
        kept = right(numbers, step)
        if kept is None and step.targets:
            numbers.changed[step.targets[0].bias] += 1e-3
        return kept

    monkeypatch.setattr(Numbers, "apply", wrong)
    monkeypatch.setattr(settle, "relative_error", lambda found, reference: 0.0)
    assert any("wrong: float64 error" in each and "(measured)" in each for each in missed(measure_folding(SMALL)))


@pytest.mark.parametrize("of", ["float32", "float64"])
def test_an_undo_that_forgets_is_found(monkeypatch, of):
    undo = FoldResult.undo

    def forgetful(result):
        undo(result)
        weight = next(result.model.parameters())
        if str(weight.dtype) == f"torch.{of}":
            with torch.no_grad():
                weight.flatten()[0].add_(1e-3)

    monkeypatch.setattr(FoldResult, "undo", forgetful)
    assert "undo did not restore every bit" in list(missed(measure_folding(SMALL)))


@pytest.mark.parametrize(
    "where",
    [
        pytest.param(lambda x: x.shape[-1] == 96, id="larger"),
        pytest.param(lambda x: len(x) == 1 and x.shape[-1] == 64, id="held-out"),
        pytest.param(lambda x: len(x) == 2, id="examples"),
    ],
)
def test_outputs_are_compared_on_other_images_and_a_larger_one(monkeypatch, where):
    fold = measure_module.fold_batch_norm

    def wrong_there(model, *args, **options):
        result = fold(model, *args, **options)
        if next(model.parameters()).dtype == torch.float64:
            forward = type(model).forward
            model.forward = lambda x: forward(model, x) + 1e-3 * where(x)
            undo = result.undo
            return SimpleNamespace(model=model, report=result.report, undo=lambda: (vars(model).pop("forward"), undo()))
        return result

    monkeypatch.setattr(measure_module, "fold_batch_norm", wrong_there)
    assert any("(measured)" in each for each in missed(measure_folding(SMALL)))


def test_what_is_not_verified_in_float64_is_found(monkeypatch):
    report = FoldReport

    def in_float32(*args, **options):
        return report(*args, **{**options, "verified_in": "float32", "note": "so it is"})

    monkeypatch.setattr(settle, "FoldReport", in_float32)
    assert "verified in float32 only: so it is" in list(missed(measure_folding(SMALL)))


def test_layers_that_are_left_are_found(monkeypatch):
    fold = measure_module.fold_batch_norm
    monkeypatch.setattr(
        measure_module, "fold_batch_norm", lambda model, x, standalone="keep": fold(model, x, exclude=["stem.bn"])
    )
    assert '1 layers left with standalone="affine"' in list(missed(measure_folding(SMALL)))


def test_a_network_that_does_not_exist_is_a_crash():
    row = measure_folding(replace(SMALL, name="timm:no_such_network"))
    assert "no_such_network" in row.crash


@pytest.mark.parametrize(
    ("found", "exact", "expected"),
    [
        ([[1.0, 3.0]], [[1.0, 4.0]], 0.25),
        ([[1.0], [2.0]], [[1.0], [1.0]], 1.0),
        ([[1.0]], [[1.0], [1.0]], float("inf")),
        ([[1.0, 1.0]], [[1.0]], float("inf")),
        ([[float("nan")]], [[1.0]], float("inf")),
        ([[]], [[]], float("inf")),
        ([], [], float("inf")),
    ],
)
def test_its_comparison_is_its_own(found, exact, expected):
    assert relative_error([torch.tensor(each) for each in found], [torch.tensor(each) for each in exact]) == expected


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([torch.ones(2, 3), torch.ones(2, 0)], "empty"),
        ([], "empty"),
        ([torch.tensor([[1.0], [float("nan")]])], "not finite"),
        ([torch.ones(2, 3)], "does not depend on the input"),
        ([torch.tensor([[1.0], [2.0]])], ""),
    ],
)
def test_outputs_that_prove_nothing(tensors, words):
    assert words in unfit(tensors)
    assert bool(words) == bool(unfit(tensors))


def test_outputs_are_copies_of_all_floats():
    images = torch.ones(1, 3)
    found = outputs(lambda x: {"a": [x.mul_(2), x.argmax()], "b": (x,)}, images)
    assert [each.dtype for each in found] == [torch.float64] * 2
    assert torch.equal(images, torch.ones(1, 3))


def test_a_journal_is_resumed_from(tmp_path):
    journal = Journal(tmp_path / "folding.jsonl", FoldingRow)
    assert journal.rows() == {}
    other = replace(GOOD, name="timm:other", fx=PeerRow("timm:other", calls=3, left=1))
    for row in (replace(GOOD, crash="once"), GOOD, other):
        journal.add(row)
    with journal.path.open("a") as file:
        file.write('{"versions": {"torch')  # killed while it wrote
    assert journal.rows() == {GOOD.name: GOOD, other.name: other}
    journal.forget([GOOD.name])
    assert journal.rows() == {other.name: other}
    journal.path.write_text(journal.path.read_text().replace(torch.__version__, "1.0"))
    assert journal.rows() == {}, "of another torch"


@pytest.fixture
def odd_networks(monkeypatch):
    """Forked by a server without threads, which is quick, and safe whatever runs in this process."""
    monkeypatch.setattr(workers_module, "_serve", odd_worker.serve)
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["zoo_models.odd_worker"])
    monkeypatch.setattr(workers_module.multiprocessing, "get_context", lambda kind: server)


@pytest.mark.usefixtures("odd_networks")
def test_a_network_that_dies_or_hangs_takes_no_other_with_it():
    names = ["fine", "dies", "hangs", "fine too"]
    found = {
        row.name: row.crash
        for row in measured(
            "folding", [replace(SMALL, name=name) for name in names], workers=1, timeout=10.0, go_on=lambda: True
        )
    }
    assert found == {
        "fine": "",
        "dies": "the process died with exit code 3",
        "hangs": "took longer than 10 s",
        "fine too": "",
    }


@pytest.mark.usefixtures("odd_networks")
def test_no_network_is_started_when_the_time_is_over():
    left = iter([True, True, False])
    rows = measured(
        "folding", [replace(SMALL, name=str(n)) for n in range(9)], workers=1, timeout=60, go_on=left.__next__
    )
    assert [row.name for row in rows] == ["0", "1"]
