"""What an audit costs in forward passes over its batches. Usage: python tests/benchmarks/audit.py"""

import time
from statistics import median

import timm
import torch
import torch.nn.functional as F

from bn_lightning import audit_batch_norm
from bn_lightning.reports.table import Table

SIZES = [32] * 8
IMAGE = 64
ROUNDS = 5


def network():
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=10).eval()


def data(seed):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 3, IMAGE, IMAGE, generator=g), torch.randint(10, (n,), generator=g)) for n in SIZES]


def forward_pass(model, batches):
    with torch.no_grad():
        for x, y in batches:
            F.cross_entropy(model(x), y)


def backward_pass(model, batches):
    for x, y in batches:
        torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))


def timed(function, *arguments, **options):
    start = time.perf_counter()
    result = function(*arguments, **options)
    return time.perf_counter() - start, result


def main():
    torch.set_num_threads(1)
    model, batches, val_batches = network(), data(1), data(2)
    loss = {"loss": F.cross_entropy}
    # Forward passes promised, of them with a backward pass, and what is given.
    audits = {
        "without a loss": (1, 0, {}),
        "without a loss, evaluation batches": (2, 0, {"val_batches": val_batches}),
        "loss": (4, 1, loss),
        "loss, evaluation batches": (6, 1, {**loss, "val_batches": val_batches}),
    }
    forward_pass(model, batches)
    ratios, confirmed = {name: [] for name in audits}, {}
    backwards = []
    for _ in range(ROUNDS):
        bare, _ = timed(forward_pass, model, batches)
        backwards.append(timed(backward_pass, model, batches)[0] / bare)
        for name, (_, _, options) in audits.items():
            seconds, report = timed(audit_batch_norm, model, batches, **options)
            ratios[name].append(seconds / bare)
            confirmed[name] = sum(row.confirmed_loss_change is not None for row in report.layers)
    both = median(backwards)
    rows = []
    for name, (forward, backward, _) in audits.items():
        passes = forward + confirmed[name]
        bound = passes - backward + backward * both
        rows.append((name, passes, backward, confirmed[name], bound, median(ratios[name])))
    title = f"timm resnet18, {len(SIZES)}×{SIZES[0]} images of {IMAGE}×{IMAGE}, in forward passes over the same batches"
    columns = ("audit", "forward passes", "with backward", "confirmed layers", "those passes alone", "time")
    print(Table(title, columns, rows, [f"a pass with its backward pass: {both:.2f}; medians of {ROUNDS} rounds"]))


if __name__ == "__main__":
    main()
