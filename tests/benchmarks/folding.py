"""What folding costs and what it gains, side by side in one run. Usage: python tests/benchmarks/folding.py

The limit is the same network with every BatchNorm left out, which gives wrong outputs; a network timed against itself
tells how much of a ratio is the machine's own.
"""

import argparse
import time
import warnings
from copy import deepcopy
from functools import partial
from statistics import median

import timm
import torch
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.folding import fold_batch_norm
from bn_lightning.folding.speed import compare_speed
from bn_lightning.reports.table import Table
from bn_lightning.selection import named_batch_norms

MODELS = {"resnet18": 8, "resnet50": 4, "mobilenetv3_large_100": 8, "efficientnet_b0": 8, "regnety_004": 8}


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
    """The limit of what folding can gain: drop and activation stay, every BN is left out, and the outputs are wrong."""
    bare = deepcopy(model)
    for parent in list(bare.modules()):
        for key, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm):
                setattr(parent, key, nn.Sequential(*child.children()) if len(child._modules) else nn.Identity())
    return bare


def seconds(call, rounds, device):
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        if device != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return median(times)


def row(name, device, batch, rounds, compiled):
    model = randomized(name).to(device)
    x = torch.randn(batch, 3, 224, 224, device=device)
    one = x[:1]
    with torch.no_grad():
        forward = seconds(partial(model, one), 10, device)
    fold = seconds(partial(fold_batch_norm, model, one, inplace=False), 3, device)
    folded = fold_batch_norm(model, one, inplace=False)
    folds = sum(each.action not in ("kept", "affine") for each in folded.report.rows)
    others = {"folded": folded.model, "bare": without_batch_norm(model), "itself": deepcopy(model)}
    try:
        others["fx"] = fuse(deepcopy(model))
    except Exception as error:
        print(f"{name}: torch.fx fuse raises {type(error).__name__}")
    prepare = torch.compile if compiled else (lambda network: network)
    reference = prepare(model)
    speed = {key: compare_speed(reference, prepare(other), x, rounds=rounds).speedup for key, other in others.items()}
    return (
        name,
        batch,
        f"{folds} of {len(folded.report.rows)}",
        folded.report.error,
        speed["folded"],
        speed["bare"],
        speed["itself"],
        speed.get("fx"),
        fold,
        fold / forward,
        forward * 10 + 2,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, help="instead of each model's own")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="compile every network first")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = [
        row(name, options.device, options.batch or batch, options.rounds, options.compile)
        for name, batch in MODELS.items()
    ]
    how = "compiled" if options.compile else "eager"
    print(
        Table(
            f"folding, 224×224, {how}, {options.device}, {torch.get_num_threads()} threads, torch {torch.__version__}",
            (
                "model",
                "batch",
                "folded",
                "float64 error",
                "speed-up",
                "BN left out (limit)",
                "against itself",
                "torch.fx fuse",
                "fold (s)",
                "in forward passes",
                "allowed (s)",
            ),
            rows,
            notes=(
                "speed-ups are medians of ratios of alternating runs; folding includes its verification",
                "and is counted in forward passes of batch 1, of which ten and two seconds are allowed",
            ),
        )
    )


if __name__ == "__main__":
    main()
