"""What the audit's passive stage costs a training step: timm's resnet18, every BatchNorm layer watched.

    python tests/benchmarks/audit_passive.py [--batch 16] [--size 96] [--rounds 30] [--threads 1]

The watch alone is timed over many batches. Beside it every round times one bare step and one watched step, in turn, and
what is printed is the median over rounds of the ratio within a round, with the same of two bare steps: below that no
difference can be told.
"""

import argparse
import statistics
import time

import timm
import torch
import torch.nn.functional as F

from bn_lightning.auditing import TrainingWatch
from bn_lightning.selection import named_batch_norms


def alone(watch, batches=500):
    """Return the seconds that the watch's calls take in a batch."""
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(batches):
            watch.begin_batch()
            watch.before_backward()
            watch.after_backward()
            watch.end_batch()
        best = min(best, (time.perf_counter() - begin) / batches)
    return best


def step(model, optimizer, x, y, watch=None):
    begin = time.perf_counter()
    if watch is not None:
        watch.begin_batch()
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    if watch is not None:
        watch.before_backward()
    loss.backward()
    if watch is not None:
        watch.after_backward()
    optimizer.step()
    if watch is not None:
        watch.end_batch()
    return time.perf_counter() - begin


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = torch.randn(options.batch, 3, options.size, options.size), torch.randint(0, 10, (options.batch,))
    watch = TrainingWatch(named_batch_norms(model))
    print(f"the watch alone: {1e6 * alone(watch):.0f} µs a batch")
    for _ in range(3):
        step(model, optimizer, x, y, watch)
    rounds = [[step(model, optimizer, x, y, each) for each in (None, watch, None)] for _ in range(options.rounds)]
    bare = statistics.median(first for first, _, _ in rounds)
    print(f"a bare step: {1e3 * bare:.1f} ms, batch of {options.batch} at {options.size} px")
    print(f"watched / bare: {statistics.median(middle / first for first, middle, _ in rounds):.4f}")
    print(f"bare / bare:    {statistics.median(last / first for first, _, last in rounds):.4f}")


if __name__ == "__main__":
    main()
