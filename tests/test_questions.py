"""Each row of the README's "What people ask" prints what the row says."""

import contextlib
import io
import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
SECTION = README.split("## What people ask\n")[1].split("\n## ")[0]
BEFORE = re.search(r"```python\n(.*?)```", SECTION, flags=re.DOTALL).group(1)
ROWS = [
    [cell.strip() for cell in line.strip("|\n").split(" | ")]
    for line in SECTION.splitlines()
    if line.startswith("| ") and "`" in line
]


def printed_by(code):
    """Run statements after those that the section begins with; what they print, its lines joined."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(f"{BEFORE}\n{code}", "README.md", "exec"), {"__name__": "question"})
    return " ".join(out.getvalue().split())


def holds(text, pattern):
    return re.search(".+?".join(map(re.escape, pattern.split("…"))), text) is not None


def test_there_are_fifteen_questions_or_more():
    assert len(ROWS) >= 15
    assert len({question for question, _, _ in ROWS}) == len(ROWS)


@pytest.mark.parametrize(("question", "typed", "prints"), ROWS, ids=[row[0][:40] for row in ROWS])
def test_a_question_is_answered_as_the_readme_says(question, typed, prints):
    lines, (expected,) = re.findall(r"`([^`]+)`", typed), re.findall(r"`([^`]+)`", prints)
    printed = printed_by("\n".join(lines))
    assert holds(printed, expected), printed


def test_without_its_trouble_a_question_is_answered_otherwise():
    """The rows that first make a trouble do not print their line on the network as it was."""
    troubles = [row for row in ROWS if re.match(r"`model\.stem", row[1])]
    assert len(troubles) >= 5
    for question, typed, prints in troubles:
        last = re.findall(r"`([^`]+)`", typed)[-1]
        expected = prints.strip("`")
        if "recalibrated" not in expected:  # which it always says
            assert not holds(printed_by(last), expected), question
