"""The wheel goes into an environment that exists already and changes nothing in it."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*command, **options):
    # Without the caller's PYTHONPATH, which could put another copy of the library first.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, env=environment, **options
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_wheel_installs_beside_what_is_there(tmp_path):
    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", tmp_path, cwd=ROOT)
    (wheel,) = tmp_path.glob("*.whl")

    # An environment that holds everything this one does, but for the library itself.
    existing = tmp_path / "existing"
    existing.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "bn_lightning" not in entry.name:
            (existing / entry.name).symlink_to(entry)
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (own / "existing.pth").write_text(f"import site; site.addsitedir({str(existing)!r})\n")
    before = {entry.name for entry in own.iterdir()}

    # Without an index: had a requirement not been met by what is there, this would fail.
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "--no-index", wheel)
    assert {entry.name for entry in own.iterdir()} - before == {"bn_lightning", "bn_lightning-0.1.0.dist-info"}
    printed = run(python, "-c", "import bn_lightning, torch; print(bn_lightning.__file__); print(torch.__file__)")
    ours, torchs = printed.splitlines()
    assert Path(ours).parent == own / "bn_lightning"
    assert Path(torchs).is_relative_to(existing)
    assert (own / "bn_lightning" / "py.typed").exists()
    assert "demo" in run(tmp_path / "venv" / "bin" / "bn-lightning", "--help")
