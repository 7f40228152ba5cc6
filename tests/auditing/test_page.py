"""What a report says as a page and in Markdown: the same as in a terminal, and every name stays text."""

import html
import math
import re
from html.parser import HTMLParser

import pytest
from auditing.shown_reports import LONG, ROWS, many_layers, small

from bn_lightning.auditing import AuditReport, Finding, GapRow, NotLooked


@pytest.fixture
def report():
    return small()


def test_the_markdown_is_short_begins_with_the_verdict_and_escapes(report):
    told = report.to_markdown()
    assert told.splitlines()[2] == "**findings: 1 error, 1 info**"
    assert "- where: largest gap in 'deep&#60;b&#62;': 1.5 output standard deviations" in told
    assert "- fix: `bn_lightning.apply_fixes(model, report)`\n  repairs 1 of 2" in told
    assert "- error not-converged, 'deep&#60;b&#62;': it lags\n    - fix: `recalibrate()`" in told
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
    assert "- error r, the model: a\\|b\n    - fix: type \\`this\\` \\| and &#60;that&#62;" in told


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
