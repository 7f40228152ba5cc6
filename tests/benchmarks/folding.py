"""What folding costs and what it gains, side by side in one run. Usage: python tests/benchmarks/folding.py"""

import time
import warnings
from copy import deepcopy
from functools import partial
from statistics import median

import timm
import torch
from torch import nn
from torch.fx.experimental.optimization import fuse

from bn_lightning.folding import fold_batch_norm
from bn_lightning.folding.speed import compare_speed
from bn_lightning.reports.table import Table
from bn_lightning.selection import named_batch_norms

MODELS = ("resnet18", "resnet50")
BATCH = 4


def randomized(name):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    for bn in named_batch_norms(model).values():
        nn.init.normal_(bn.running_mean, 0, 0.1)
        nn.init.uniform_(bn.running_var, 0.5, 2)
        nn.init.uniform_(bn.weight, 0.5, 1.5)
        nn.init.normal_(bn.bias, 0, 0.1)
    return model


def without_batch_norm(model):
    """The limit of what folding can gain: the same network with every BN left out, and wrong outputs."""
    bare = deepcopy(model)
    for name in named_batch_norms(bare):
        parent, _, child = name.rpartition(".")
        setattr(bare.get_submodule(parent), child, nn.Identity())
    return bare


def seconds(call, rounds):
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times)


def main():
    warnings.simplefilter("ignore")
    rows = []
    for name in MODELS:
        model, x = randomized(name), torch.randn(BATCH, 3, 224, 224)
        one = x[:1]
        with torch.no_grad():
            forward = seconds(partial(model, one), 10)
        fold = seconds(partial(fold_batch_norm, model, one, inplace=False), 3)
        folded = fold_batch_norm(model, one, inplace=False)
        folds = sum(row.action != "kept" for row in folded.report.rows)
        rows.append(
            (
                name,
                f"{folds} of {len(folded.report.rows)}",
                folded.report.error,
                compare_speed(model, folded.model, x, rounds=15).speedup,
                compare_speed(model, fuse(deepcopy(model)), x, rounds=15).speedup,
                compare_speed(model, without_batch_norm(model), x, rounds=15).speedup,
                compare_speed(model, model, x, rounds=15).speedup,
                fold / forward,
            )
        )
    print(
        Table(
            f"folding, {BATCH}×3×224×224, {torch.get_num_threads()} CPU threads, torch {torch.__version__}",
            (
                "model",
                "folded",
                "float64 error",
                "speed-up",
                "torch.fx fuse",
                "BN left out (limit)",
                "against itself",
                "cost (forward passes)",
            ),
            rows,
            notes=("speed-ups are medians of ratios of alternating runs; cost is of folding with its verification",),
        )
    )


if __name__ == "__main__":
    main()
