"""Make ``import torchvision`` work in this interpreter's environment, if a CPU torch keeps it from working.

Run with the environment's own python. Where torchvision imports, or is not installed, nothing is done.
"""

import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

SYMPTOM = "operator torchvision::nms does not exist"


def repair(site: Path, import_error: Callable[[], str]) -> int:
    """Detect the fault, put the start-up file into ``site``, check; return an exit status."""
    error = import_error()
    if not error or "No module named 'torchvision'" in error:
        return 0
    if SYMPTOM in error:
        shutil.copy(Path(__file__).with_name("torchvision_schemas.py"), site / "torchvision_schemas.py")
        (site / "torchvision_schemas.pth").write_text("import torchvision_schemas\n")
        error = import_error()
    if error:
        print(error, file=sys.stderr)
        return 1
    print("torchvision: made importable beside the CPU torch (only the tests use it)")
    return 0


def _import_error() -> str:
    done = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True, check=False)
    return done.stderr if done.returncode else ""


if __name__ == "__main__":
    sys.exit(repair(Path(sysconfig.get_path("purelib")), _import_error))
