"""What importing costs: ``import bn_lightning`` beside torch, and a Trainer that asks without ``BN_LIGHTNING``.

python tests/benchmarks/imports.py [--rounds 7]; milliseconds, medians over processes, by ``python -X importtime``
"""

import argparse
import os
import re
import statistics
import subprocess
import sys

OURS = "import torch; import bn_lightning"
ASKED = "import lightning.pytorch; from bn_lightning.autoload import from_environment; from_environment()"


def milliseconds(code):
    """Return what the library's own files take, with whatever they bring in, in one process."""
    environment = {key: value for key, value in os.environ.items() if key != "BN_LIGHTNING"}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    rows = re.findall(r"import time:\s+(\d+) \|\s+(\d+) \|( *)(\S+)", done.stderr)
    ours = [(len(indent), int(total)) for _, total, indent, name in rows if name.startswith("bn_lightning")]
    outermost = min(depth for depth, _ in ours)
    return sum(total for depth, total in ours if depth == outermost) / 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    for what, code in (("import bn_lightning beside torch", OURS), ("a Trainer without the variable", ASKED)):
        print(f"{what}: {statistics.median(milliseconds(code) for _ in range(rounds)):.1f} ms (60 are allowed)")


if __name__ == "__main__":
    main()
