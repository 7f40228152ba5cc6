"""How exact and how fast recalibration is, beside torch's own. Usage: python tests/benchmarks/recalibration.py"""

import sys
import time
from pathlib import Path
from statistics import median

import timm
import torch
from torch.optim.swa_utils import update_bn

from bn_lightning import recalibrate_batch_norm
from bn_lightning.reports.table import Table

sys.path.append(str(Path(__file__).parents[1]))
from population_truth import batch_norms, pooled_float64

SIZES = [32] * 7 + [8]
IMAGE = 96
ROUNDS = 7
OURS, THEIRS = "recalibrate_batch_norm", "torch's update_bn"


def network():
    torch.manual_seed(0)
    return timm.create_model("resnet18")


def data(mean, std, channels=3, layout=torch.contiguous_format):
    g = torch.Generator().manual_seed(1)
    shapes = [(n, channels, IMAGE, IMAGE) for n in SIZES]
    return [(mean + std * torch.randn(shape, generator=g)).contiguous(memory_format=layout) for shape in shapes]


def plain_pass(model, batches):
    """The same passes with batch statistics, nothing measured or written."""
    layers = batch_norms(model).values()
    model.eval()
    for layer in layers:
        layer.training, layer.track_running_stats = True, False
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for layer in layers:
        layer.training, layer.track_running_stats = False, True


def errors(model, truth):
    """The largest error of any layer's channels: of the mean in σ, of the variance relative."""
    found = [
        (
            float(((layer.running_mean.double() - mean) / var.sqrt()).abs().max()),
            float((layer.running_var.double() / var - 1).abs().max()),
        )
        for layer, (_, mean, var) in ((layer, truth[name]) for name, layer in batch_norms(model).items())
    ]
    return [max(column) for column in zip(*found, strict=True)]


def timed(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def main():
    torch.set_num_threads(1)
    model, batches = network(), data(1, 2)
    truth = pooled_float64(model, batches)
    ways = {OURS: recalibrate_batch_norm, THEIRS: lambda model, batches: update_bn(batches, model)}
    exact = {}
    for name, way in ways.items():
        way(model, batches)
        exact[name] = errors(model, truth)
    ratios = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            bare = timed(plain_pass, model, batches)
            ratios[name].append(timed(way, model, batches) / bare)
    rows = [(name, *exact[name], median(ratios[name])) for name in ways]
    title = f"timm resnet18, {IMAGE}×{IMAGE}, batches 7×32 + 8, mean 1, std 2, against pooled float64"
    print(Table(title, ("", "mean, in σ", "variance, relative", "time of the bare passes"), rows))

    rows = []
    for name, layout in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
        batches = data(1e4, 0.1, channels=64, layout=layout)
        values = torch.cat(batches).double()
        recalibrate_batch_norm(model, batches, include=["bn1"], forward=lambda model, x: model.bn1(x))
        of_mean = (model.bn1.running_mean.double() - values.mean((0, 2, 3))).abs().max()
        of_var = (model.bn1.running_var.double() / values.var((0, 2, 3)) - 1).abs().max()
        rows.append((name, float(of_mean) / 2**-10, float(of_var)))
    title = "its first BN, own inputs of mean 1e4 and std 0.1"
    print(Table(title, ("", "mean, in units of float32's last place", "variance, relative"), rows))


if __name__ == "__main__":
    main()
