"""Print the tests' constraints with the lowest versions that ``dependencies`` allows in place of the newest.

torch stays at what the constraints pin: its lowest exists with CUDA only, which is gigabytes.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Pinned for the newest of what stands at its lowest now, which asks for others.
FREED = {"fsspec", "ml-dtypes", "numpy", "packaging", "typer", "typeshed-client"}


def floors(pyproject: str) -> dict[str, str]:
    """Return the lowest version that is allowed, by package; the two Lightning families go together."""
    (dependencies,) = re.findall(r"^dependencies = \[$(.*?)^\]$", pyproject, flags=re.DOTALL | re.MULTILINE)
    lowest = dict(re.findall(r'"([\w-]+)(?:\[\w+\])?>=([\d.]+)', dependencies))
    del lowest["torch"]
    return {**lowest, "pytorch-lightning": lowest["lightning"]}


def with_floors(constraints: str, lowest: dict[str, str]) -> str:
    """Return constraints that pin those packages to those versions."""
    kept = [line for line in constraints.splitlines() if _package(line) not in lowest.keys() | FREED]
    return "\n".join([*kept, *(f"{name}=={version}" for name, version in lowest.items())])


def _package(line: str) -> str:
    return line.partition("==")[0].strip().lower()


if __name__ == "__main__":
    constraints = ROOT / "tests" / "constraints.txt"
    print(with_floors(constraints.read_text(), floors((ROOT / "pyproject.toml").read_text())))
