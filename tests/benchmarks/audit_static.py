"""What the static stage of the audit costs beyond the recorded forward pass: python tests/benchmarks/audit_static.py

Every round times a plain forward pass, the recorded one and the whole static audit once, in turn; the table has medians
over rounds, and differences are taken within a round. Recording and audit get small images: what lies between the two
does not depend on their size, and so does not drown in the noise of two long passes. Garbage is collected between
rounds alone, as timeit does it: with timm loaded one full collection takes 0.3 s, and falls on whoever comes by.
"""

import argparse
import gc
import time
from functools import partial
from statistics import median

import timm
import torch

from bn_lightning import audit_batch_norm, record_forward
from bn_lightning.reports.table import Table

SMALL = 64


def milliseconds(function):
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def measure(name, size, rounds):
    """Time one network: a forward pass, recording one, the audit less the recording; in ms, and in forward passes."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    small = x[..., :SMALL, :SMALL].contiguous()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)

    def forward():
        with torch.no_grad():
            model(x)

    def record():
        record_forward(model, small)

    audit = partial(audit_batch_norm, model, example_inputs=small, optimizer=optimizer)
    times = []
    for _ in range(rounds + 2):
        gc.collect()
        times.append([milliseconds(each) for each in (forward, record, audit)])
    times = times[2:]
    static = [whole - recorded for _, recorded, whole in times]
    ratio = [(whole - recorded) / plain for plain, recorded, whole in times]
    return name, *(median(column) for column in zip(*times, strict=True)), median(static), median(ratio)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", type=int, default=224)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    gc.disable()
    print(
        Table(
            f"static audit, 2 images of {options.size} pixels, {options.threads} threads, medians of {options.rounds}",
            (
                "network",
                "forward (ms)",
                f"recorded at {SMALL} (ms)",
                f"audit at {SMALL} (ms)",
                "audit − recorded (ms)",
                "in forward passes",
            ),
            [measure(name, options.size, options.rounds) for name in ("resnet18", "resnet50", "efficientnet_b0")],
        )
    )
