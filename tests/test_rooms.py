"""A room imports only from lower rooms, and importing the package brings in nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bn_lightning

SOURCE = Path(__file__).parent.parent / "src" / "bn_lightning"
RANK = {
    # Of the design's rank 0, these two stand under the others, which could otherwise not raise one family of errors.
    "errors": -1,
    "internals": -1,
    "selection": 0,
    "preservation": 0,
    "functional": 0,
    "reports": 0,
    "layers": 1,
    "tracing": 1,
    "folding": 2,
    "monitoring": 2,
    "recalibration": 2,
    "networks": 2,
    "zoo": 3,
    "auditing": 3,
    "probes": 3,
    "modules": 4,
    "callbacks": 5,
    "autoload": 6,
    "cli": 6,
}
LIGHTNING_ROOMS = {"modules", "callbacks", "autoload", "cli"}
FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def room_of(path):
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the room"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "bn_lightning" else [module]
        else:
            continue
        for name in names:
            if name.startswith("bn_lightning."):
                yield name.split(".")[1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_only_from_lower_rooms(path):
    room = room_of(path)
    for target in imported_rooms(ast.parse(path.read_text())):
        assert target == room or RANK[target] < RANK[room], f"{room} imports {target}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_lightning_stays_in_its_rooms(path):
    tops = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            tops.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            tops.add((node.module or "").split(".")[0])
    if room_of(path) not in LIGHTNING_ROOMS:
        assert not tops & {"lightning", "pytorch_lightning", "torchmetrics"}


def test_the_rule_sees_every_form_of_import():
    tree = ast.parse(
        "import bn_lightning.cli\nfrom bn_lightning import callbacks\n"
        "def f():\n    from bn_lightning.folding.plan import x\n"
    )
    assert sorted(imported_rooms(tree)) == ["callbacks", "cli", "folding"]


def test_import_is_light():
    heavy = ["lightning", "pytorch_lightning", "torchmetrics", "matplotlib", "tensorboard", "rich", "torchvision"]
    code = f"import bn_lightning, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_resolves():
    assert {name for name in bn_lightning.__all__ if not callable(getattr(bn_lightning, name))} == set()
    assert set(bn_lightning.__all__) <= set(dir(bn_lightning))
    with pytest.raises(AttributeError, match="has no attribute 'GostBatchNorm'"):
        bn_lightning.GostBatchNorm  # noqa: B018
