from bn_lightning.reports.table import Table


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
