import html
import io
import re

import pytest
from rich.console import Console

from bn_lightning.reports.table import Table

NAME = "backbone.encoder.layer1.0.downsample.conv1"
REMARK = "3 of 64 channels zero; 17 nonfinite values"
WIDE = Table(
    "the 2 worst of 62 layers",
    ("layer", "rms", "rms / median", "dead %", "remark"),
    [(NAME, 1234.5, 0.4, 100, REMARK), ("[bold]fc[/bold]", None, 1.0, 0, "")],
    ["60 layers are not shown"],
)


def printed(width, *, table=WIDE, **options):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, **options)
    table.print(console)
    return console.file.getvalue()


def test_text_is_plain_and_never_wraps():
    name = "encoder." * 40 + "[bold]conv[/bold]"
    text = str(Table("t", ("layer", "std"), [(name, 1.5), ("short", None)], notes=["a note"]))
    lines = text.splitlines()
    assert any(name in line and line.endswith("1.5") for line in lines)
    assert any(line.split() == ["short", "–"] for line in lines)
    assert lines[0] == "t"
    assert lines[-1] == "a note"
    assert "\x1b" not in text


def test_html_escapes_names():
    drawn = Table("<t>", ("<c>",), [("<script>alert(1)</script>",)], notes=["<n>"])._repr_html_()
    assert "<script>" not in drawn
    assert "&lt;script&gt;" in drawn
    assert "<t>" not in drawn
    assert "<n>" not in drawn


@pytest.mark.parametrize("width", [16, 20, 40, 60, 80, 90, 100, 110, 130, 200])
def test_what_is_printed_fits_the_terminal_and_breaks_no_word(width):
    text = printed(width)
    assert max(map(len, text.splitlines())) <= width
    words = text.replace("─", " ").split()
    assert {word for word in words if "…" not in word} >= {
        "1.23e+03",
        "channels",
        "nonfinite",
        "values",
        "100",
        "zero;",
    }
    known = {
        *" ".join([WIDE.title, *WIDE.columns, *WIDE.notes, REMARK]).split(),
        "1.23e+03",
        "0.4",
        "100",
        "–",
        "1",
        "0",
    }
    names = [word for word in words if word not in known]
    assert all(
        re.fullmatch("backb?o?n?e?.*conv1|.*…conv1|.*…nv1|\\[bold\\]fc\\[/bold\\]|\\[b.*….*\\]", name) for name in names
    ), names


@pytest.mark.parametrize(("width", "whole_name"), [(200, True), (120, True), (96, False)])
def test_names_are_shortened_only_where_they_have_to_be(width, whole_name):
    (line,) = [line for line in printed(width).splitlines() if "backb" in line]
    assert (NAME in line) == whole_name
    assert line.split()[1:4] == ["1.23e+03", "0.4", "100"]


def test_in_a_very_narrow_terminal_a_row_is_a_paragraph():
    lines = printed(43).splitlines()
    start = lines.index(NAME)
    assert lines[start + 1] == "  rms 1.23e+03   rms / median 0.4"
    assert lines[start + 2 : start + 5] == [
        "  dead % 100",
        "  remark 3 of 64 channels zero; 17",
        "    nonfinite values",
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_only_a_terminal_gets_colours(terminal):
    console = Console(file=io.StringIO(), width=200, force_terminal=terminal, color_system="standard", _environ={})
    WIDE.print(console)
    text = console.file.getvalue()
    assert ("\x1b[" in text) == terminal
    if not terminal:
        assert text == f"{WIDE}\n"


def test_without_a_console_it_goes_to_standard_output(capsys):
    WIDE.print()
    assert capsys.readouterr().out == f"{WIDE}\n"


def test_an_output_without_greek_letters_ends_no_run():
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii", write_through=True), force_terminal=True, width=60)
    Table("σ", ("layer", "γ"), [("bn", None)]).print(console)
    assert b"bn" in raw.getvalue()


@pytest.mark.parametrize("width", [8, 100])
def test_a_table_of_numbers_alone_is_printed(width):
    text = printed(width, table=Table("t", ("step", "loss"), [(1, 0.5), (2, 0.25)]))
    assert [word for word in text.split() if word[0].isdigit()] == ["1", "0.5", "2", "0.25"]


@pytest.mark.parametrize("width", [30, 100])
def test_a_table_without_rows_says_why(width):
    text = printed(width, table=Table("none called", ("layer", "std"), [], ["nothing ran"]))
    assert text.split() == ["none", "called", "nothing", "ran"]


NASTY = [
    "a|b",
    "a\\|b",
    "__init__",
    "*x*",
    "[x](http://y)",
    "`c`",
    "<b>h</b>",
    "a&amp;b",
    "~~s~~",
    "# h",
    "a\nb",
    "1_2_3",
]


def test_markdown_shows_every_name_as_it_is_in_tensorboard():
    markdown_to_safe_html = pytest.importorskip("tensorboard.plugin_util").markdown_to_safe_html
    text = Table("a_b *c*", ("layer|x", "std"), [(name, 0.5) for name in NASTY], ["a_note_", "1 < 2"]).to_markdown()
    shown = markdown_to_safe_html(text)
    cells = [html.unescape(cell) for cell in re.findall("<t[dh](?: [^>]*)?>(.*?)</t[dh]>", shown, flags=re.DOTALL)]
    assert cells[:2] == ["layer|x", "std"]
    assert cells[2::2] == [name.replace("\n", " ") for name in NASTY]
    assert set(cells[3::2]) == {"0.5"}
    paragraphs = [html.unescape(part) for part in re.findall("<p>(.*?)</p>", shown)]
    assert paragraphs == ["<strong>a_b *c*</strong>", "a_note_", "1 < 2"]


def test_markdown_shows_every_name_as_it_is_in_github_flavour():
    markdown_it = pytest.importorskip("markdown_it")
    text = Table("t", ("layer",), [(name,) for name in NASTY]).to_markdown()
    shown = markdown_it.MarkdownIt("gfm-like", {"linkify": False}).render(text)
    cells = [html.unescape(cell) for cell in re.findall("<td>(.*?)</td>", shown)]
    assert cells == [name.replace("\n", " ") for name in NASTY]


def test_numbers_are_to_the_right_in_markdown():
    assert Table("t", ("layer", "std"), [("a", None), ("b", 1.0)]).to_markdown().splitlines()[3] == "| --- | ---: |"
