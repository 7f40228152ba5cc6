"""What watching costs: one training step with every layer watched, against the bare step, beside how others do it.

    python tests/benchmarks/watching.py [--rounds 15] [--threads 2] [--device cpu] [--batch 32] [--size 96] [--no-peers]

Every round times the bare step and each way of watching once, in turn, and what is printed is the median over rounds
of the ratio within a round, so that a machine whose speed drifts does not favour one of them. The fused pass compiles
before the rounds begin, in empty caches; the seconds are printed.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from bn_lightning.functional.fused import FusedStatistics
from bn_lightning.monitoring import ActivationWatch, RunningStatisticsWatch
from bn_lightning.selection import named_batch_norms


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.act2 = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential()
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        return self.act2(y + self.downsample(x))


def resnet18(classes=10):
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    widths = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
    widths += [(128, 256, 2), (256, 256, 1), (256, 512, 2), (512, 512, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes)]
    return nn.Sequential(*stem, *(Block(*width) for width in widths), *head)


def composer(module, inputs, output):
    """Composer's ActivationMonitor, without its iteration over the batch: four host reads a tensor."""
    for value in (inputs[0].detach(), output.detach()):
        torch.linalg.vector_norm(value, dim=-1).mean().item()
        value.mean().item()
        centred = value - value.mean(-1, keepdim=True)
        (centred.pow(4).mean(-1) / centred.pow(2).mean(-1).square()).mean().item()
        value.amax(-1).mean().item()


def fastai(module, inputs, output):
    """fastai's ActivationStats: the whole tensor to the host, where it is binned."""
    value = output.detach().cpu().float()
    value.mean().item(), value.std().item(), (value <= 0.05).sum().item(), value.histc(40, 0, 10)


def hugging_face(module, inputs, output):
    """Hugging Face's DebugUnderflowOverflow: smallest and largest magnitude of inputs, outputs and parameters."""
    for value in (*inputs, output, *module.parameters(recurse=False)):
        magnitude = value.detach().abs()
        magnitude.min().item(), magnitude.max().item()


def three_reductions(module, inputs, output):
    """What people write first: five statistics of the whole tensor."""
    value = output.detach()
    torch.var_mean(value), torch.aminmax(value), torch.count_nonzero(value)


class Bolts:
    """lightning-bolts' ModuleDataMonitor: whole tensors to the host, inputs too, and binned there."""

    def __init__(self, folder):
        self.writer, self.call = SummaryWriter(folder), itertools.count()

    def __call__(self, module, inputs, output):
        call = next(self.call)
        self.writer.add_histogram("input", inputs[0].detach().cpu(), call)
        self.writer.add_histogram("output", output.detach().cpu(), call)


class Hooked:
    """One of the peers, as a context."""

    def __init__(self, model, hook):
        self.model, self.hook = model, hook

    def __enter__(self):
        leaves = [module for module in self.model.modules() if not list(module.children())]
        self.handles = [leaf.register_forward_hook(self.hook) for leaf in leaves if not isinstance(leaf, nn.Sequential)]

    def __exit__(self, *exception):
        for handle in self.handles:
            handle.remove()


class Watched:
    """This library, sampling or between samples, the flush included."""

    def __init__(self, model, sampling, **options):
        self.model, self.sampling = model, sampling
        self.watch = ActivationWatch(**options)

    def __enter__(self):
        self.watch.install(self.model)
        self.watch.sampling = self.sampling

    def __exit__(self, *exception):
        self.watch.remove()


class Running:
    """BatchNormMonitor's watch at every step, read as often as asked."""

    def __init__(self, model, every):
        self.watch = RunningStatisticsWatch(named_batch_norms(model))
        self.every, self.step = every, 0

    def flush(self):
        self.watch.end(self.step)
        self.step += 1
        if self.step % self.every == 0:
            self.watch.read()
        self.watch.begin()


def finished(device):
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(step, ways, flush, device):
    with ways:
        finished(device)
        started = time.perf_counter()
        step()
        flush()
        finished(device)
        return time.perf_counter() - started


class Bare:
    def __enter__(self): ...

    def __exit__(self, *exception): ...


def tap_microseconds(calls=200_000):
    """Time one call of a tap between samples, above the bare module call."""
    layer, x = nn.Identity(), torch.zeros(1)

    def timed():
        started = time.perf_counter()
        for _ in range(calls):
            layer(x)
        return time.perf_counter() - started

    bare = timed()
    watch = ActivationWatch()
    watch.install(nn.Sequential(layer, nn.ReLU()), include=("0",))
    tapped = timed()
    watch.remove()
    return (tapped - bare) / calls * 1e6


def device_kibibytes(model, step):
    """Measure what one sample of a network keeps on the device: statistics, and histograms of 512 counts a layer."""
    watched = Watched(model, sampling=True)
    with watched:
        step()
    taken = watched.watch._buffer._values
    layers = len(watched.watch.flush().blocks)
    return layers, taken.numel() * taken.element_size() / 1024, 512 * 8 / 1024


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments.add_argument("--batch", type=int, default=32)
    arguments.add_argument("--size", type=int, default=96)
    arguments.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = resnet18().to(options.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x = torch.randn(options.batch, 3, options.size, options.size, device=options.device)
    target = torch.randint(10, (options.batch,), device=options.device)

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()

    # Kernels left by an earlier run would hide what compiling costs.
    caches = tempfile.TemporaryDirectory()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = caches.name
    fused = FusedStatistics()
    sampled, compiled = Watched(model, sampling=True), Watched(model, sampling=True, statistics=fused)
    backward, binned = Watched(model, sampling=True, gradients=True), Watched(model, sampling=True, histograms=True)
    ways = {
        "bare step": (Bare(), lambda: None),
        "ActivationWatch, sampled step, flushed": (sampled, sampled.watch.flush),
        "the same, fused": (compiled, compiled.watch.flush),
        "the same, eager with gradients": (backward, backward.watch.flush),
        "the same, eager with histograms": (binned, binned.watch.flush),
        "ActivationWatch, between samples": (Watched(model, sampling=False), lambda: None),
        "RunningStatisticsWatch at every step": (Bare(), Running(model, 50).flush),
        "the same, read at every step": (Bare(), Running(model, 1).flush),
    }
    peers = {
        "three reductions of the whole tensor": (Hooked(model, three_reductions), lambda: None),
        "like Hugging Face (min and max only)": (Hooked(model, hugging_face), lambda: None),
        "like fastai": (Hooked(model, fastai), lambda: None),
        "like Composer": (Hooked(model, composer), lambda: None),
        "like lightning-bolts": (Hooked(model, Bolts(os.path.join(caches.name, "bolts"))), lambda: None),
    }
    ways |= peers if options.peers else {}
    times = {name: [] for name in ways}
    for turn in range(options.rounds + 2):
        for name, (way, flush) in ways.items():
            taken = seconds(step, way, flush, options.device)
            if turn >= 2:
                times[name].append(taken)
    bare = times["bare step"]
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} threads"
    shape = "×".join(map(str, x.shape))
    print(f"ResNet-18, {shape}, {where}, torch {torch.__version__}, {options.rounds} rounds\n")
    print(f"{'':40s} {'ms':>7s}  of the bare step")
    for name, taken in times.items():
        ratio = statistics.median(one / other for one, other in zip(taken, bare, strict=True))
        print(f"{name:40s} {1e3 * statistics.median(taken):7.1f}  {ratio:.3f}")
    failed = f", then failed: {fused.reason}" if fused.reason else ""
    print(f"\nthe fused pass compiled for {fused.compile_seconds:.1f} s{failed}")
    layers, statistics_kib, histogram_kib = device_kibibytes(model, step)
    print(
        f"device memory per 100 layers: {100 * statistics_kib / layers:.0f} KiB of statistics, "
        f"{100 * histogram_kib:.0f} KiB of histograms"
    )
    print(f"a tap between samples: {tap_microseconds():.2f} µs")


if __name__ == "__main__":
    main()
