"""What the README and the examples show runs as it stands there."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_quickstart_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples" / "quickstart.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "folded-backward" in printed
    assert len((ROOT / "examples" / "quickstart.py").read_text().splitlines()) <= 40


def test_zoo_ghost_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples" / "zoo_ghost.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "converted 11 of 14 BatchNorm layers to GhostBatchNorm" in printed
    accuracies = re.findall(r"test/accuracy\W+([\d.]+)", printed)
    assert len(accuracies) == 2
    assert accuracies[0] == accuracies[1]
    assert float(accuracies[0]) > 0.8


def test_readme_blocks_run_in_order(tmp_path, monkeypatch):
    """One after another in one namespace, as somebody would type them."""
    assert len(BLOCKS) >= 3
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"README.md, block {number}", "exec"), namespace)


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http|#)([^)]+)\)", (ROOT / "README.md").read_text()))
def test_readme_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_readme_has_no_placeholder():
    assert "@@" not in (ROOT / "README.md").read_text()
