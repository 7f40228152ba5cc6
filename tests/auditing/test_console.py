"""What a report says in a terminal: what is wrong, where and what to type first; all within the width."""

import io
import math
import os
import re

import pytest
from auditing.shown_reports import FOUND, ROWS, losses, many_layers, small
from rich.console import Console

from bn_lightning.auditing import RULES, AuditReport, ChannelGap, Finding, GapRow, Repair
from bn_lightning.auditing.console import to_text
from bn_lightning.auditing.words import BOUNDS


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(os, "get_terminal_size", lambda *args: (_ for _ in ()).throw(OSError))


@pytest.fixture
def report():
    return small()


def test_the_verdict_comes_first_with_what_where_cost_and_fix(report):
    assert str(report).splitlines()[:8] == [
        "BatchNorm audit of Net: 3 layers, 3 training batches",
        "findings: 1 error, 1 info",
        "  what   not-converged in 'deep<b>'",
        "  where  largest gap in 'deep<b>': 1.5 output standard deviations",
        "  loss   stale statistics cost 1.00 [0.88, 1.12] (deployed 2.1, recalibrated 1.1)",
        "  fix    bn_lightning.apply_fixes(model, report)",
        "         repairs 1 of 2 findings (not-converged); no weight changes; has undo()",
        "",
    ]


def test_a_worst_finding_that_takes_a_decision_has_its_own_fix_first():
    shift = Finding("evaluation-shift", "error", "stem", "differs", {}, "any", "give both the same preprocessing")
    slow = Finding("not-converged", "warning", "stem", "lags", {}, "any", "recalibrate()", Repair("recalibrate"))
    lines = str(AuditReport("Net", 3, ROWS, (shift, slow))).splitlines()
    assert lines[2] == "  what   evaluation-shift in 'stem', not-converged in 'stem'"
    assert lines[4:6] == [
        "  fix    give both the same preprocessing",
        "  fix    bn_lightning.apply_fixes(model, report)",
    ]
    only_info = str(AuditReport("Net", 3, ROWS[1:], FOUND[1:])).splitlines()
    assert only_info[1:3] == ["findings: 1 info", ""], "nothing to do, and no gap to speak of"


def test_of_many_rules_three_are_named_and_of_many_fixes_too():
    found = [
        Finding(f"rule-{index}", "warning", name, "is off", {}, "any", f"do {index}{name}", repair)
        for index in range(5)
        for name, repair in (("a", Repair("momentum", 0.1)), ("b", None))
    ]
    lines = str(AuditReport("Net", 3, (), tuple(found[:-1]))).splitlines()
    assert lines[2] == "  what   rule-0 in 2 layers, rule-1 in 2 layers, rule-2 in 2 layers and 2 more"
    assert lines[4] == (
        "         repairs 5 of 9 findings (rule-0, rule-1, rule-2, rule-3, rule-4); no weight changes; has undo()"
    )
    same = [Finding("r", "warning", f"l{index}", "is off", {}, "any", f"do {index}") for index in range(5)]
    told = str(AuditReport("Net", 3, (), tuple(same))).splitlines()
    place = told.index("  fix:       do 0")
    assert told[place + 1 : place + 4] == [
        "  or there:  do 1",
        "  or there:  do 2",
        "  … and 2 more fixes; report.findings has all",
    ]
    assert "… and" not in str(AuditReport("Net", 3, (), tuple(same[:3])))


@pytest.mark.parametrize(
    ("gap", "told"),
    [(0.099, None), (0.1, "0.1 output standard deviations"), (math.nan, "not finite"), (math.inf, "inf output")],
    ids=str,
)
def test_a_gap_is_told_from_noteworthy_on(gap, told):
    lines = str(AuditReport("Net", 3, (GapRow("", gap, (), 8, None),), ())).splitlines()
    assert lines[2].startswith(f"  where  largest gap in (root): {told}") if told else lines[2] == ""


def test_the_bounds_are_those_of_the_rule():
    threshold = next(rule.threshold for rule in RULES if rule.slug == "not-converged")
    assert threshold.startswith("gap " + ", ".join(f"≥ {bound:g} ({name})" for name, bound in BOUNDS))


def test_the_details_have_evidence_threshold_fix_losses_gaps_and_what_was_missed(report):
    lines = str(report).splitlines()
    place = lines.index("ERROR not-converged in 'deep<b>'")
    assert lines[place + 1 : place + 5] == [
        "  it lags",
        "  evidence:  gap=1.5",
        "  threshold: gap ≥ 1",
        "  fix:       recalibrate()",
    ]
    place = lines.index("INFO decayed-affine in the model")
    assert lines[place + 1 : place + 3] == ["  decay", "  fix:       no decay"]
    place = lines.index("loss on the same 3 evaluation batches, mean [95 % interval]")
    assert lines[place + 4] == "  deployed               2.10 [1.62, 2.58]  evaluation mode, as the network is"
    assert lines[place + 6] == (
        "dropout: no evidence, the difference is 0 [0, 0] (batch statistics 1, full training 1)"
    )
    rows = [line.split() for line in lines if line.startswith(("  deep<b> ", "  first "))]
    assert rows == [["deep<b>", "1.5", "3", "(2)", "-0.2", "-0.15"], ["first", "0.02", "+0", "–"]]
    assert "'frozen': frozen" in lines
    assert lines[-2:] == ["not looked at", "  padding: it needs data"]


def test_the_verdict_of_no_findings_says_what_was_compared():
    def verdict(batches, rows):
        return AuditReport("Net", batches, rows, ()).summary

    assert verdict(3, ROWS) == "no findings: the running statistics of 2 layers describe the training data"
    assert "no layer could be compared" in verdict(3, ROWS[2:])
    assert "compared with nothing" in verdict(0, ROWS[2:])
    told = str(AuditReport("Net", 0, ROWS[2:], ()))
    assert "gaps: none" in told
    assert "'frozen': frozen" in told


@pytest.mark.parametrize("number", [1, 100])
def test_nothing_is_wider_than_110_columns_or_longer_than_two_screens(number):
    lines = str(many_layers(number)).splitlines()
    assert max(map(len, lines)) <= 110
    assert len(lines) < 80
    if number == 100:
        assert "ERROR not-converged: 100 layers (76 errors, 24 warnings)" in lines
        assert "and 95 more" in " ".join(str(many_layers(100)).split())
        assert "… and 80 layers with smaller gaps; report.layers has all" in lines
        assert sum(line.startswith("  backbone.") for line in lines) == 20
        assert str(many_layers(100)).count("recalibrate_batch_norm") == 1


@pytest.mark.parametrize(
    ("layers", "noteworthy", "shown"), [(20, 0, 20), (21, 0, 5), (60, 5, 5), (60, 7, 7), (60, 20, 20), (60, 21, 20)]
)
def test_of_many_layers_the_noteworthy_are_shown_and_the_others_counted(layers, noteworthy, shown):
    rows = tuple(GapRow(f"bn{index}", 0.1 if index < noteworthy else 0.099, (), 8, None) for index in range(layers))
    told = str(AuditReport("Net", 1, rows, ())).splitlines()
    assert sum(line.startswith("  bn") for line in told) == shown
    assert any(f"… and {layers - shown} layer" in line for line in told) == (layers != shown)


@pytest.mark.parametrize(("columns", "widest"), [("72", 72), ("80", 80), ("300", 110)])
def test_printing_wraps_to_the_terminal(report, monkeypatch, columns, widest):
    monkeypatch.setenv("COLUMNS", columns)
    long = Finding("r", "warning", None, "word " * 60, {"number": 1.0}, "limit " * 60, "do this; " * 60)
    told = str(AuditReport("Net", 3, ROWS, (*FOUND, long), report.losses, report.not_looked)).splitlines()
    assert widest - 25 < max(map(len, told)) <= widest


def test_a_narrow_table_has_fewer_channels_before_names_are_cut():
    worst = tuple(ChannelGap(place, 1.5) for place in range(3))
    for width, channels in ((110, 3), (80, 2), (79, 1)):
        rows = [GapRow("a.name.of.25.letters.in.it", 1.5, worst, 8, None, 0.1, 0.1)]
        told = to_text(AuditReport("Net", 1, tuple(rows), ()), width)
        line = next(line for line in told.splitlines() if line.startswith("  a.name"))
        assert line.split()[0] == rows[0].name
        assert line.count("(1.5)") == channels


def test_a_terminal_gets_colours_and_its_width_and_a_file_plain_text(report):
    def printed(terminal, encoding="utf-8"):
        raw = io.BytesIO()
        file = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
        report.print(
            Console(file=file, width=80, force_terminal=terminal, color_system="standard" if terminal else None)
        )
        file.flush()
        return raw.getvalue().decode(encoding)

    assert printed(False) == f"{report}\n"
    coloured = printed(True)
    assert "\x1b[1;31mERROR not-converged in 'deep<b>'\x1b[0m" in coloured
    assert "\x1b[1;31mfindings: 1 error, 1 info\x1b[0m" in coloured
    assert "\x1b[1m  fix    bn_lightning.apply_fixes(model, report)\x1b[0m" in coloured
    assert max(len(line) for line in re.sub(r"\x1b\[[0-9;]*m", "", coloured).splitlines()) <= 80
    assert "gap ? 1" in printed(False, "ascii"), "a log file without ≥ is no reason to fail"
    assert "gap ? 1" in printed(True, "ascii")


@pytest.mark.parametrize(("batches", "style"), [(2, "\x1b[1;32m"), (0, "")], ids=["looked", "not-looked"])
def test_only_what_was_looked_at_is_green(batches, style):
    console = Console(file=io.StringIO(), width=110, force_terminal=True, color_system="standard")
    AuditReport("Net", batches, ROWS[1:], ()).print(console)
    assert console.file.getvalue().splitlines()[1].startswith(f"{style}no findings")


def test_parts_are_apart_and_words_whole(report):
    lines = str(report).splitlines()
    for part in ("ERROR not", "INFO dec", "loss on", "gaps along", "not looked"):
        place = next(index for index, line in enumerate(lines) if line.startswith(part))
        assert lines[place - 1] == "", part
    change = "loss change: of the deployed network to first order, if that layer alone were recalibrated."
    assert change in lines
    without = AuditReport("Net", 3, (GapRow("a", 0.5, (), 8, None),), ())
    assert "loss change" not in str(without)
    text = f"run-this-command-{'x' * 150} " + "bn-lightning audit --fail_on=error " * 20
    told = str(AuditReport("Net", 3, (), (Finding("r", "error", None, "m", {}, "t", text),)))
    assert text.strip() in " ".join(told.split())


def test_intervals_of_one_batch_and_ends_below_zero_are_explained():
    one = {key: [1.0] for key in ("full_training", "batch_statistics", "recalibrated", "evaluation_statistics")}
    told = str(AuditReport("Net", 1, ROWS, (), losses(**one, deployed=[9.0])))
    assert "9 (no interval)" in told
    assert "One batch has no interval" in told
    assert "stale statistics: no evidence, the difference is 8 (no interval)" in told
    noisy = {key: [0.0, 0.1, 3.0] for key in one}
    told = str(AuditReport("Net", 1, ROWS, (), losses(**noisy, deployed=[0.0, 0.1, 3.0])))
    assert "An end below 0, where the loss cannot be, only says that 3 batches are few." in told
    assert "below 0" not in str(AuditReport("Net", 1, ROWS, (), losses()))


def test_a_difference_below_zero_is_said_as_such_and_one_that_is_not_finite_is_unknown():
    readings = losses(full_training=[2.0, 2.3, 1.8], deployed=[math.nan] * 3)
    told = {each.name: readings.sentence(each) for each in readings.differences}
    assert told["dropout"].startswith("dropout: batch statistics is 1.03 [")
    assert "] below full training (batch statistics 1, full training 2.03)" in told["dropout"]
    assert told["stale statistics"] == "stale statistics: unknown (deployed nan, recalibrated 1.1)"
    assert "loss   dropout" in str(AuditReport("Net", 1, ROWS, (), readings))
