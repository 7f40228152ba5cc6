"""What each variant costs beside torch's own BatchNorm, in one run.

python tests/benchmarks/variants.py [--device cuda]; without it every device there is, and two processes
"""

import argparse
import gc
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from bn_lightning.layers.masked import MaskedBatchNorm
from bn_lightning.layers.registry import VARIANTS
from bn_lightning.reports.table import Table

SHAPES = ((64, 64, 32, 32), (256, 256, 4, 4))
LARGE = (256, 64, 32, 32)  # for memory: 64 MiB an activation
ROUNDS = 80
# After the schedule of the first steps, when its corrections are at work.
CONVERGED = {"renorm": {"r_warmup": None, "d_warmup": None}}


def build(name, channels, device):
    layer = VARIANTS[name](channels, **CONVERGED.get(name, {})).to(device)
    nn.init.normal_(layer.running_mean, 0, 0.1)
    return layer


def call(layer, x):
    if isinstance(layer, MaskedBatchNorm):  # a fifth of the positions is padding
        torch.manual_seed(0)
        return partial(layer, mask=torch.rand(x.shape[0], *x.shape[2:], device=x.device) > 0.2)
    return layer


def train(forward, x, grad):
    x.grad = None
    forward(x).backward(grad)


def evaluate(forward, x):
    with torch.no_grad():
        forward(x)


def ratio(ours, theirs, device, rounds=ROUNDS):
    """Median of the times of ``ours`` over that of ``theirs``, taken in alternation; and theirs, in ms."""

    def timed(run):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for run in (ours, theirs) * 3:
        timed(run)
    own, others = [], []
    for index in range(rounds):  # either goes first by turns: what one frees the next may use again
        for run, into in ((ours, own), (theirs, others))[:: 1 if index % 2 else -1]:
            into.append(timed(run))
    return median(own) / median(others), median(others) * 1e3


def inputs(shape, device, memory_format=torch.contiguous_format):
    x = torch.randn(shape, device=device).to(memory_format=memory_format).requires_grad_()
    return x, torch.randn_like(x)


def times(device):
    rows = []
    for name in (None, *VARIANTS):
        cells = [name or "nn.BatchNorm2d, against itself"]
        for memory_format in (torch.contiguous_format, torch.channels_last):
            for shape in SHAPES:
                x, grad = inputs(shape, device, memory_format)
                plain = nn.BatchNorm2d(shape[1]).to(device)
                layer = build(name, shape[1], device) if name else nn.BatchNorm2d(shape[1]).to(device)
                cells.append(ratio(partial(train, call(layer, x), x, grad), partial(train, plain, x, grad), device)[0])
        rows.append(tuple(cells))
    heads = [f"{'×'.join(map(str, shape))}{last}" for last in ("", " channels_last") for shape in SHAPES]
    print(Table(f"forward + backward, of nn.BatchNorm2d's, {where(device)}", ("variant", *heads), rows))


def evaluation(device):
    rows = []
    for shape in SHAPES:
        x, _ = inputs(shape, device)
        layer, plain = VARIANTS["adaptive"](shape[1], alpha=0.5).to(device).eval(), nn.BatchNorm2d(shape[1]).to(device)
        rows.append(
            (
                "×".join(map(str, shape)),
                ratio(partial(evaluate, layer, x), partial(evaluate, plain, x), device)[0],
                ratio(partial(evaluate, layer, x), partial(evaluate, plain.eval(), x), device)[0],
            )
        )
    heads = ("shape", "of nn.BatchNorm2d's forward in training", "of its forward in evaluation")
    print(Table(f"adaptive, forward in evaluation, {where(device)}", heads, rows))


def peak(run, device):
    """Return by how much a run raises the memory in use at its worst moment, in bytes."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # Linux: begin a new peak
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(key):
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{key}:"))


def memory(device):
    x, grad = inputs(LARGE, device)
    rows = []
    for name in (None, *VARIANTS):
        layer = build(name, LARGE[1], device) if name else nn.BatchNorm2d(LARGE[1]).to(device)
        forward = call(layer, x)
        train(forward, x, grad)
        x.grad = None
        values = [peak(partial(train, forward, x, grad), device)]
        while len(values) < 5:
            x.grad = None
            values.append(peak(partial(train, forward, x, grad), device))
        x.grad = None
        rows.append((name or "nn.BatchNorm2d", median(values) / (x.numel() * x.element_size())))
    heads = ("variant", "forward + backward")
    print(Table(f"peak memory, in activations of {'×'.join(map(str, LARGE))}, {where(device)}", heads, rows))


def where(device):
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}"


def replica(rank, world, address, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=world)
    for shape in SHAPES:
        x, grad = inputs(shape, "cpu")
        layer, plain = build("cross_replica", shape[1], "cpu"), nn.BatchNorm2d(shape[1])
        measured, theirs = ratio(partial(train, layer, x, grad), partial(train, plain, x, grad), "cpu")
        if rank == 0:
            queue.put(("×".join(map(str, shape)), measured, theirs))
    dist.barrier()
    dist.destroy_process_group()


def processes(world=2):
    with tempfile.TemporaryDirectory() as folder:
        queue = mp.get_context("spawn").SimpleQueue()
        mp.spawn(replica, (world, str(Path(folder) / "meet"), queue), nprocs=world)
    rows = [queue.get() for _ in SHAPES]
    heads = ("shape a process", "of nn.BatchNorm2d's beside it", "nn.BatchNorm2d, ms")
    print(Table(f"cross_replica in {world} processes (gloo, one thread each), forward + backward", heads, rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    only = parser.parse_args().device
    for device in [only] if only else ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        times(device)
        evaluation(device)
        memory(device)
    if only != "cuda":
        processes()


if __name__ == "__main__":
    main()
