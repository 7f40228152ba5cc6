"""Pooled statistics of every BN layer's input in float64, by two passes and no formula for merging."""

from contextlib import ExitStack

import torch
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norms(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def run(model, batches, hook):
    """Run all batches, every BN normalizing by the batch and all else in evaluation mode, float32 as it is."""
    layers = batch_norms(model)
    model.eval()
    with ExitStack() as stack, torch.no_grad():
        for name, layer in layers.items():
            layer.training, layer.track_running_stats = True, False
            handle = layer.register_forward_pre_hook(lambda module, args, name=name: hook(name, args[0].double()))
            stack.callback(handle.remove)
            stack.callback(setattr, layer, "track_running_stats", True)
            stack.callback(setattr, layer, "training", False)
        for batch in batches:
            model(batch)


def pooled_float64(model, batches):
    """Name to (count, mean, variance with correction=1): first all sums, then all squares about the mean of all."""
    count, total, squares = {}, {}, {}

    def add(name, x):
        count[name] = count.get(name, 0) + x.numel() // x.shape[1]
        total[name] = total.get(name, 0) + x.transpose(0, 1).flatten(1).sum(1)

    def square(name, x):
        centred = x.transpose(0, 1).flatten(1) - (total[name] / count[name])[:, None]
        squares[name] = squares.get(name, 0) + centred.square().sum(1)

    run(model, batches, add)
    run(model, batches, square)
    return {name: (n, total[name] / n, squares[name] / (n - 1)) for name, n in count.items()}
