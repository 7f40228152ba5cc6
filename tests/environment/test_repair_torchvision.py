"""The start-up file that lets torchvision be imported beside a CPU torch."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# What torchvision's own import does first, and stumbles over when its operators did not load.
BROKEN = """
import torch
@torch.library.register_fake("torchvision::nms")
def _(dets, scores, iou_threshold): ...
"""


def python(code, *paths):
    # -S: no site-packages start-up files, so that nothing but the paths given is at work.
    path = os.pathsep.join(map(str, [*paths, *[entry for entry in sys.path if entry.endswith("site-packages")]]))
    return subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=False, env={"PYTHONPATH": path}
    )


@pytest.fixture
def torchvision_beside_another_torch(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(BROKEN)
    return tmp_path


def test_without_the_hook_the_import_fails_as_users_see_it(torchvision_beside_another_torch):
    done = python("import torchvision", torchvision_beside_another_torch)
    assert "operator torchvision::nms does not exist" in done.stderr


def test_with_the_hook_it_imports(torchvision_beside_another_torch):
    done = python(
        "import torchvision_schemas, torchvision, torch; print(torch.ops.torchvision.qnms)",
        torchvision_beside_another_torch,
        HERE,
    )
    assert done.returncode == 0, done.stderr
    assert "torchvision.qnms" in done.stdout


def test_an_interpreter_that_wants_no_torchvision_pays_nothing():
    done = python("import sys, torchvision_schemas, json; print('torch' in sys.modules)", HERE)
    assert done.stdout.strip() == "False"


def test_operators_that_are_there_are_left_alone(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("")
    code = (
        "import torchvision_schemas, torch\n"
        "library = torch.library.Library('torchvision', 'DEF')\n"
        "for name in ('nms', 'qnms'):\n"
        "    library.define(name + '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n"
        "library.impl('nms', lambda dets, scores, iou: dets, 'CPU')\n"
        "import torchvision\n"
        "print(torch.ops.torchvision.nms(torch.ones(2, 4), torch.ones(2), 0.5).shape)\n"
    )
    done = python(code, tmp_path, HERE)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([2, 4])" in done.stdout


@pytest.mark.parametrize(
    ("errors", "status", "writes"),
    [
        pytest.param([""], 0, False, id="imports"),
        pytest.param(["ModuleNotFoundError: No module named 'torchvision'"], 0, False, id="not-there"),
        pytest.param(["RuntimeError: some other trouble"], 1, False, id="other-trouble"),
        pytest.param(["operator torchvision::nms does not exist", ""], 0, True, id="repaired"),
        pytest.param(["operator torchvision::nms does not exist", "still broken"], 1, True, id="not-repaired"),
    ],
)
def test_the_script_acts_on_that_fault_and_no_other(tmp_path, errors, status, writes):
    spec = importlib.util.spec_from_file_location("repair_torchvision", HERE / "repair_torchvision.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.repair(tmp_path, iter(errors).__next__) == status
    written = ["torchvision_schemas.pth", "torchvision_schemas.py"] if writes else []
    assert sorted(path.name for path in tmp_path.iterdir()) == written


def test_this_environment_imports_torchvision():
    done = subprocess.run([sys.executable, "-c", "import torchvision, torchmetrics"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
