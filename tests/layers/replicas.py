"""The program of the processes that `test_cross_replica.py` starts, and the cases that both go through."""

import copy
import os
import random
import sys
from dataclasses import dataclass

import torch
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint

from bn_lightning.errors import BatchNormError
from bn_lightning.layers import CrossReplicaBatchNorm

WORLD = 3
PAIR = (0, 2)  # a group that one process does not belong to
CHANNELS = 5


@dataclass(frozen=True)
class Case:
    sizes: tuple[int, ...]  # examples of each process
    tail: tuple[int, ...] = (4, 3)
    affine: bool | str = True
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    track: bool = True
    paused: bool = False
    offset: float = 0.0
    momentum: float | None = 0.1
    renorm: tuple[float, float] | None = None  # r_max, d_max
    pair: bool = False
    input_needs_gradient: bool = True

    @property
    def members(self):
        return PAIR if self.pair else range(WORLD)


def drawn():
    """Random crossings of everything, the same in every process."""
    dice = random.Random(0)
    for number in range(24):
        sizes = tuple(dice.choice((0, 1, 2, 5)) for _ in range(WORLD))
        tail = dice.choice(((), (1,), (6,), (3, 2), (1, 1), (2, 3, 2)))
        if sum(sizes) > 1:
            yield (
                f"drawn-{number}",
                Case(
                    sizes,
                    tail,
                    affine=dice.choice((True, "scale", "shift", False)),
                    dtype=dice.choice((torch.float32, torch.float64, torch.bfloat16, torch.float16)),
                    channels_last=dice.random() < 0.5,
                    momentum=dice.choice((0.1, None)),
                    renorm=dice.choice((None, None, (1.5, 0.5), (1e6, 1e6))),
                ),
            )


CASES = {
    "equal": Case((4, 4, 4)),
    "unequal": Case((1, 9, 4)),
    "empty": Case((0, 3, 5)),
    "one-with-all": Case((0, 0, 6)),
    "one-value-each": Case((1, 1, 1), ()),
    "float64": Case((2, 5, 3), dtype=torch.float64),
    "bfloat16": Case((2, 0, 9), dtype=torch.bfloat16),
    "bfloat16-without-affine": Case((40, 0, 90), dtype=torch.bfloat16, affine=False),
    "channels-last": Case((3, 1, 4), channels_last=True),
    "rows": Case((3, 8, 2), ()),
    "scale": Case((3, 8, 2), affine="scale"),
    "shift": Case((3, 8, 2), affine="shift"),
    "without-affine": Case((3, 8, 2), affine=False),
    "without-buffers": Case((3, 8, 2), track=False),
    "paused": Case((3, 8, 2), paused=True),
    "cumulative": Case((3, 8, 2), momentum=None),
    "large-mean": Case((8, 31, 16), (9, 9), offset=1e4),
    "group": Case((3, 6, 2), pair=True),
    "frozen-below": Case((3, 0, 2), input_needs_gradient=False),
    "renorm-clipped": Case((2, 0, 5), renorm=(1.2, 0.1)),
    "renorm-free": Case((2, 4, 5), renorm=(1e6, 1e6), dtype=torch.float64),
    "renorm-shift": Case((2, 4, 5), renorm=(1e6, 0.3), affine="shift"),
    "renorm-group": Case((2, 4, 5), renorm=(2.0, 1.0), pair=True),
    **dict(drawn()),
}


def generator(*key):
    return torch.Generator().manual_seed(hash(key) % 2**31)


def shard(case, rank):
    """This process's x, and the gradient that reaches its y."""
    source = generator(rank, *case.sizes)
    shape = (case.sizes[rank], CHANNELS, *case.tail)
    # Another distribution in every process, so that each one's own statistics are wrong.
    x = case.offset + rank + (0.1 if case.offset else 1 + rank) * torch.randn(shape, generator=source)
    grad = torch.randn(shape, generator=source)
    if case.channels_last and len(shape) > 2:
        x, grad = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, grad))
    return x.to(case.dtype), grad.to(case.dtype)


def build(case, group=None):
    """The layer, with random parameters and buffers, the same in every process."""
    options = {} if case.renorm is None else dict(zip(("r_max", "d_max"), case.renorm, strict=True))
    if case.renorm is not None:
        options |= {"renorm": True, "r_warmup": None, "d_warmup": None}
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    layer = CrossReplicaBatchNorm(
        CHANNELS, 1e-3, case.momentum, case.affine, case.track, dtype=wide, process_group=group, **options
    )
    source = generator(1)
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=source))
            else:
                tensor.fill_(7)
    if case.paused:
        layer.track_running_stats = False
    return layer


def run(case, rank, group):
    """One step of one process, and what an evaluation after it gives."""
    layer = build(case, group)
    x, grad = shard(case, rank)
    x.requires_grad_(case.input_needs_gradient)
    y = layer(x)
    if y.requires_grad:
        y.backward(grad)
    return {
        "y": y.detach(),
        "strides": y.stride(),
        "x": x.grad,
        **{name: parameter.grad for name, parameter in layer.named_parameters()},
        **{name: buffer.clone() for name, buffer in layer.named_buffers()},
        "evaluated": layer.eval()(x).detach(),
    }


def count_collectives(rank):
    """How many collectives a forward pass, a backward pass and an evaluation take."""
    calls, counts, original = [], [], distributed.all_reduce
    distributed.all_reduce = lambda *arguments, **options: calls.append(1) or original(*arguments, **options)
    case = CASES["empty"]
    layer, x = build(case), shard(case, rank)[0].requires_grad_()
    y = layer(x)
    counts.append(len(calls))
    y.sum().backward()
    counts.append(len(calls))
    layer.eval()(x)
    counts.append(len(calls))
    distributed.all_reduce = original
    return counts


def refusals(rank):
    """What one value, or none, in all processes together leads to."""
    found = []
    for sizes in ((0, 1, 0), (0, 0, 0)):
        layer = build(Case(sizes, ()))
        before = copy.deepcopy(layer.state_dict())
        try:
            layer(shard(Case(sizes, ()), rank)[0])
        except BatchNormError as error:
            same = all(torch.equal(before[key], value) for key, value in layer.state_dict().items())
            found.append(f"{error} buffers kept: {same}")
    return found


def network(norm):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), norm(6), nn.ReLU(), nn.Linear(6, 2))


def train(net, x, target):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), target).backward()
        optimizer.step()


def trained_with_ddp(rank):
    """Parameters and buffers after a few steps on this process's third of the data."""
    net = nn.parallel.DistributedDataParallel(network(CrossReplicaBatchNorm))
    train(net, *(part.tensor_split(WORLD)[rank] for part in data()))
    return net.module.state_dict()


def data():
    return torch.randn(18, 4, generator=generator(5)), torch.randn(18, 2, generator=generator(6))


def recomputed(rank):
    """Gradients for x with and without activation checkpointing, whose second forward is in the backward pass."""
    case = CASES["unequal"]
    found = []
    for run_layer in (lambda layer, x: layer(x), lambda layer, x: checkpoint(layer, x, use_reentrant=False)):
        x, grad = shard(case, rank)
        run_layer(build(case), x.requires_grad_()).backward(grad)
        found.append(x.grad)
    return found


def compiled(rank):
    """Gradients for x without and with a compiler, of a process without examples too."""
    case = CASES["empty"]
    found = []
    for wrap in (lambda layer: layer, lambda layer: torch.compile(layer, backend="aot_eager")):
        x, grad = shard(case, rank)
        wrap(build(case))(x.requires_grad_()).backward(grad)
        found.append(x.grad)
    return found


def copied(rank, pair):
    """Whether a copy of a layer with a group shares it and works."""
    if rank not in PAIR:
        return True
    x = shard(CASES["group"], rank)[0]
    layer = build(CASES["group"], pair)
    other = copy.deepcopy(layer)
    same = other.process_group is pair and torch.equal(other(x), layer(x))
    return same and other.weight is not layer.weight and list(other.state_dict()) == list(layer.state_dict())


def process(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    pair = distributed.new_group(list(PAIR))
    found = {name: run(case, rank, pair if case.pair else None) for name, case in CASES.items()}
    found["collectives"] = count_collectives(rank)
    found["refusals"] = refusals(rank)
    found["ddp"] = trained_with_ddp(rank)
    found["recomputed"] = recomputed(rank)
    found["compiled"] = compiled(rank)
    found["copied"] = copied(rank, pair)
    torch.save(found, os.path.join(folder, f"{rank}.pt"))
    distributed.destroy_process_group()


if __name__ == "__main__":
    process(int(sys.argv[1]), sys.argv[2])
