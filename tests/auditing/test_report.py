"""What a report says: in a terminal, as JSON with a fixed structure, in Markdown, and as a page that stands alone."""

import html
import io
import json
import math
import os
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from bn_lightning.auditing import RULES, AuditReport, ChannelGap, Finding, GapRow, LossReading, NotLooked, Repair
from bn_lightning.auditing.console import to_text
from bn_lightning.auditing.losses import compare_losses
from bn_lightning.auditing.words import BOUNDS

LONG = "backbone.encoder.stages.3.blocks.11.very_long_attribute_name_of_a_block.mlp.norm2"
ROWS = (
    GapRow("deep<b>", 1.5, (ChannelGap(3, 2.0),), 640, None, -0.2, -0.15, index=1),
    GapRow("first", 0.02, (), 640, None, 0.0, index=0),
    GapRow("frozen", None, (), 640, "frozen", index=2),
)
FOUND = (
    Finding(
        "not-converged", "error", "deep<b>", "it lags", {"gap": 1.5}, "gap ≥ 1", "recalibrate()", Repair("recalibrate")
    ),
    Finding("decayed-affine", "info", None, "decay", {"layers": 3}, "any", "no decay"),
)


def losses(source="evaluation", **changed):
    read = {
        "full_training": [1.0, 1.2, 0.8],
        "batch_statistics": [1.0, 1.2, 0.8],
        "recalibrated": [1.1, 1.25, 0.95],
        "deployed": [2.1, 2.3, 1.9],
        "evaluation_statistics": [1.1, 1.25, 0.95],
        **changed,
    }
    return compare_losses(source, read, [10] * len(read["deployed"]))


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(os, "get_terminal_size", lambda *args: (_ for _ in ()).throw(OSError))


@pytest.fixture
def report():
    return AuditReport("Net", 3, ROWS, FOUND, losses(), (NotLooked("padding", "it needs data"),))


def many_layers(number):
    """Build the worst case for the width: long names, three worst channels, losses, many layers."""
    worst = tuple(ChannelGap(1000 + place, 1234.5) for place in range(3))
    rows = [
        GapRow(f"{LONG}.{index:03}", 2.5 - index * 0.02, worst, 640, None, -1.2e-5, -1.1e-5, index=number - index)
        for index in range(number)
    ]
    levels = ["error" if row.gap >= 1 else "warning" if row.gap >= 0.25 else "info" for row in rows]
    message = "evaluation's output is far from what the training data's statistics give, " * 3
    found = [
        Finding(
            "not-converged",
            level,
            row.name,
            message,
            {"gap": row.gap, "updates": 3},
            "gap ≥ 1",
            "recalibrate_batch_norm(model, train_batches)",
            Repair("recalibrate"),
        )
        for row, level in zip(rows, levels, strict=True)
    ]
    missed = [NotLooked(f"rule-{index}", "it needs an optimizer") for index in range(30)]
    return AuditReport("Net", 3, tuple(rows), tuple(found), losses(), tuple(missed))


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


def test_the_structure_of_the_json_is_what_its_version_says(report):
    def structure(value):
        if isinstance(value, dict):
            return {key: structure(inner) for key, inner in value.items()}
        return [structure(value[0])] if isinstance(value, list) and value else type(value).__name__

    reading = dict.fromkeys(("mean", "low", "high"), "float")
    difference = {"name": "str", "higher": "str", "lower": "str", **reading, "evident": "bool"}
    finding = dict.fromkeys(("rule", "severity", "layer", "message", "threshold", "fix"), "str")
    assert structure(json.loads(report.to_json())) == {
        "schema_version": "int",
        "model": "str",
        "batches": "int",
        "layers": [
            {
                "name": "str",
                "gap": "float",
                "worst_channels": [{"channel": "int", "gap": "float"}],
                "count": "int",
                "reason": "NoneType",
                "predicted_loss_change": "float",
                "confirmed_loss_change": "float",
                "index": "int",
            }
        ],
        "losses": {
            "source": "str",
            "batches": "int",
            **dict.fromkeys(
                ("full_training", "batch_statistics", "recalibrated", "deployed", "evaluation_statistics"), reading
            ),
            "differences": [difference],
        },
        "findings": [{**finding, "evidence": {"gap": "float"}, "applicable": "bool"}],
        "not_looked": [{"what": "str", "reason": "str"}],
    }
    parsed = json.loads(report.to_json())
    assert parsed["schema_version"] == 2
    assert [found["applicable"] for found in parsed["findings"]] == [True, False]
    assert parsed["layers"][0]["worst_channels"] == [{"channel": 3, "gap": 2.0}]
    assert parsed["losses"]["differences"][2]["evident"]


def test_json_is_strict_about_numbers_that_are_not_finite():
    rows = (GapRow("a", math.nan, (ChannelGap(0, math.inf),), 8, None),)
    layer = json.loads(AuditReport("Net", 1, rows, ()).to_json(), parse_constant=pytest.fail)["layers"][0]
    assert layer["gap"] == "nan"
    assert layer["worst_channels"][0]["gap"] == "inf"


@pytest.mark.parametrize(
    ("severities", "codes"),
    [((), (0, 0, 0)), (("info",), (1, 0, 0)), (("warning", "info"), (1, 1, 0)), (("error",), (1, 1, 1))],
    ids=["none", "info", "warning", "error"],
)
def test_the_exit_code_is_one_from_the_severity_on(severities, codes):
    found = tuple(Finding("r", severity, None, "", {}, "", "") for severity in severities)
    report = AuditReport("Net", 1, (), found)
    assert tuple(report.exit_code(level) for level in ("info", "warning", "error")) == codes
    assert report.exit_code() == codes[-1]


def test_the_markdown_is_short_begins_with_the_verdict_and_escapes(report):
    told = report.to_markdown()
    assert told.splitlines()[2] == "**findings: 1 error, 1 info**"
    assert "- where: largest gap in 'deep&#60;b&#62;': 1.5 output standard deviations" in told
    assert "- fix: `bn_lightning.apply_fixes(model, report)`\n  repairs 1 of 2" in told
    assert "| error | not-converged | 'deep&#60;b&#62;' | it lags | recalibrate() |" in told
    assert "- stale statistics cost 1.00 \\[0.88, 1.12\\]" in told
    assert "| deep&#60;b&#62; | 1.5 | 3 (2) | -0.2 | -0.15 |" in told
    assert told.endswith("Not looked at: padding")
    assert "<b>" not in told
    many = many_layers(100).to_markdown()
    assert many.count("…") == 10, "ten layers"
    assert len(many.splitlines()) < 50


def test_what_would_break_a_line_of_markdown_is_escaped_in_it():
    fix = "type `this`\n| and <that>"
    told = AuditReport("Net", 1, (), (Finding("r", "error", None, "a|b", {}, "", fix),)).to_markdown()
    assert "- fix: type \\`this\\` \\| and &#60;that&#62;" in told
    assert "| a\\|b | type" in told


def test_the_page_stands_alone_and_escapes_names(report, tmp_path):
    report.save_html(tmp_path / "folder" / "page.html")
    page = (tmp_path / "folder" / "page.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "deep&lt;b&gt;" in page
    for alien in ("deep<b>", "<script", "http", "url(", "@import", "<link"):
        assert alien not in page
    assert page.count("data:image/png;base64,") == 2, "the gaps and the losses"
    text = html.unescape(re.sub(r"<style>.*?</style>|<[^>]+>", "\n", page, flags=re.S))
    for said in (
        *("findings: 1 error, 1 info", "bn_lightning.apply_fixes(model, report)", "it lags", "evidence: gap=1.5"),
        *("threshold: gap ≥ 1", "recalibrate()", "2.10 [1.62, 2.58]", "padding", "it needs data", "frozen"),
        "stale statistics cost 1.00 [0.88, 1.12] (deployed 2.1, recalibrated 1.1)",
    ):
        assert said in text, said
    order = [text.index(said) for said in ("findings: 1 error", "ERROR", "Every layer", "Not looked")]
    assert order == sorted(order)


@pytest.mark.parametrize("field", ["rule", "layer", "message", "evidence", "threshold", "fix", "model", "reason"])
def test_the_page_escapes_whatever_comes_from_outside(field):
    evil = "<img src=x onerror=alert(1)>&"
    given = dict.fromkeys(("rule", "layer", "message", "threshold", "fix"), "fine")
    given |= {field: evil} if field in given else {}
    evidence = {"key": evil if field == "evidence" else 1}
    found = [Finding(severity="error", evidence=evidence, **given) for _ in range(2)]
    rows = (GapRow(given["layer"], 0.5, (), 8, evil if field == "reason" else None),)
    missed = (NotLooked(evil, evil),) if field == "reason" else ()
    report = AuditReport(evil if field == "model" else "Net", 3, rows, tuple(found), None, missed)
    for page in (report.to_html(), report._repr_html_()):
        assert "<img src=x" not in page
        assert "&lt;img src=x onerror=alert(1)&gt;&amp;" in page


def test_the_page_has_every_layer_in_the_order_of_the_network_and_each_finding_of_a_rule():
    report = many_layers(30)
    page = report.to_html()
    places = [page.index(f"<td>{LONG}.{index:03}</td>") for index in range(30)]
    assert places == sorted(places, reverse=True)
    assert "all 30, with their evidence" in page
    assert "<h3>ERROR not-converged: 30 layers</h3>" in page
    assert page.count("&#x27;,") < 30
    assert '<section class="card error">' in page


class Outline(HTMLParser):
    """Checks that every element is closed in its place, and collects tables."""

    def __init__(self):
        super().__init__()
        self.open, self.tables, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1].append(data)


def outlined(page):
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    return outline


def test_the_page_is_well_formed_and_its_tables_are_whole(report):
    outline = outlined(report.to_html())
    losses, layers, notes, missed = outline.tables
    assert losses[0] == ["reading", "mean [95 % interval]", "which is"]
    assert ["deployed", "2.10 [1.62, 2.58]", "evaluation mode, as the network is"] in losses
    assert layers == [
        ["layer", "gap", "worst channels (gap)", "values per channel", "loss change predicted", "confirmed"],
        ["first", "0.02", "640", "+0", "–"],
        ["deep<b>", "1.5", "3 (2)", "640", "-0.2", "-0.15"],
        ["frozen", "–", "640", "–", "–"],
    ]
    assert notes == [["note", "layers"], ["frozen", "'frozen'"]]
    assert missed == [["what", "why"], ["padding", "it needs data"]]
    text = "\n".join(outline.text)
    assert "ERROR not-converged in 'deep<b>'" in outline.text
    assert "dropout: no evidence, the difference is 0 [0, 0] (batch statistics 1, full training 1)" in outline.text
    for number in ("0.02", "640", "+0"):
        assert f'<td class="number">{number}</td>' in report.to_html()
    assert "<td>3 (2)</td>" in report.to_html()
    for line in ("what: not-converged in 'deep<b>'", "fix:", "repairs 1 of 2 findings", "Loss change: of the deployed"):
        assert f"\n{line}" in text, line
    plain = AuditReport("Net", 3, (GapRow("", math.nan, (), 8, None),), ())
    (layers,) = outlined(plain.to_html()).tables
    assert layers == [["layer", "gap", "worst channels (gap)", "values per channel"], ["(root)", "nan", "8"]]
    assert "Loss change" not in plain.to_html()


def test_a_notebook_shows_the_same_as_a_fragment(report):
    shown = report._repr_html_()
    assert "<html" not in shown
    assert shown.startswith('<div class="bnl-report"><style>')
    assert shown in report.to_html()


def test_a_report_without_gaps_has_no_picture():
    page = AuditReport("Net", 0, ROWS[2:], ()).to_html()
    assert "data:image" not in page
    assert 'class="card "' in page, "no verdict of health without data"
    assert 'class="card fine"' in AuditReport("Net", 2, ROWS[1:], ()).to_html()


def test_the_picture_has_the_layers_in_the_order_of_the_network(report):
    figure = report.figure()
    bars = {round(bar.get_x() + 0.4): bar.get_height() for bar in figure.axes[0].patches}
    assert bars == {0: pytest.approx(0.02), 1: pytest.approx(1.5)}, "and none for a layer without a gap"
    assert [text.get_text() for text in figure.texts] == ["Net: findings: 1 error, 1 info", "1  deep<b>: 1.5"]


def test_differences_are_paired_and_intervals_say_where_there_is_no_evidence(report):
    stale = report.losses.difference("stale statistics")
    assert stale.is_evident
    assert stale.mean == pytest.approx(1.0, abs=1e-9)
    assert not report.losses.difference("dropout").is_evident
    assert report.losses.deployed == LossReading(*(getattr(report.losses.deployed, k) for k in ("mean", "low", "high")))
    one = compare_losses(
        "training",
        {key: [1.0] for key in ("full_training", "batch_statistics", "recalibrated")} | {"deployed": [9.0]},
        [1],
    )
    assert not one.difference("stale statistics").is_evident, "one batch has no interval"


def test_scalars_are_gaps_and_losses(report):
    scalars = report.scalars()
    assert scalars["bn/deep<b>/gap"] == 1.5
    assert scalars["bn/loss/deployed"] == pytest.approx(2.1)
    assert len(scalars) == 7
    assert "bn/frozen/gap" not in scalars
