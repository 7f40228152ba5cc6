"""A small language for networks: a program is a list of operations on numbered values, and a module runs it."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from bn_lightning.layers import FrozenBatchNorm, GhostBatchNorm

__all__ = ["FUNCTIONS", "Node", "Program", "ProgramNetwork"]


@dataclass(frozen=True, slots=True)
class Node:
    """One operation.

    Attributes:
        op: A name in `FUNCTIONS`, or ``conv, conv_transpose, linear, bn``.
        reads: Numbers of the values it reads; 0 is the network's input.
        makes: Numbers of the values it makes.
        layer: Name of the module that does it; two nodes with the same use one module twice.
        options: Of the function or module.
    """

    op: str
    reads: tuple[int, ...]
    makes: tuple[int, ...] = ()
    layer: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        given = [f"v{index}" for index in self.reads] + [f"{key}={value!r}" for key, value in self.options.items()]
        name = f"{self.layer}: {self.op}" if self.layer else self.op
        return f"{', '.join(f'v{index}' for index in self.makes)} = {name}({', '.join(given)})"


@dataclass(slots=True)
class Program:
    """Nodes in execution order, and who else looks.

    Attributes:
        nodes: The operations.
        kept: Numbers of values that stay on the network as attributes.
        returned: Numbers of values it returns although something reads them; those that nothing reads it returns too.
        hooks: Layer name to the kind of hook that it carries.
        seed: Of weights and statistics.
    """

    nodes: list[Node] = field(default_factory=list)
    kept: set[int] = field(default_factory=set)
    returned: set[int] = field(default_factory=set)
    hooks: dict[str, str] = field(default_factory=dict)
    seed: int = 0

    @property
    def layers(self) -> dict[str, Node]:
        """For each module the node that calls it first, in the order of execution."""
        found: dict[str, Node] = {}
        for node in self.nodes:
            if node.layer:
                found.setdefault(node.layer, node)
        return found

    @property
    def ends(self) -> list[int]:
        """Numbers of all values that it returns."""
        read = {index for node in self.nodes for index in node.reads}
        made = [index for node in self.nodes for index in node.makes]
        return [index for index in made if index not in read or index in self.returned]

    def build(self, *, hooks: bool = True) -> "ProgramNetwork":
        """Make the network, in float64 and evaluation mode, the same each time."""
        network = ProgramNetwork(self).double().eval()
        for name, node in self.layers.items():
            _randomize(network.get_submodule(name), node.options, self.seed + zlib.crc32(name.encode()))
            if hooks and name in self.hooks:
                getattr(network.get_submodule(name), f"register_{self.hooks[name]}")(lambda *args: None)
        return network

    def __repr__(self) -> str:
        lines = [str(node) for node in self.nodes]
        lines += [f"self.kept{index} = v{index}" for index in sorted(self.kept)]
        lines += [f"{kind} on {name}" for name, kind in self.hooks.items()]
        returned = ", ".join(f"v{index}" for index in self.ends)
        return "\n    ".join([f"Program of seed {self.seed}:", *lines, f"return {returned}"])


class ProgramNetwork(nn.Module):
    """Runs a program; every module is a child with its own name."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        for name, node in program.layers.items():
            self.add_module(name, _make_module(node))

    def forward(self, x: Tensor) -> list[Tensor]:
        values = {0: x}
        for node in self.program.nodes:
            made = self.run(node, [values[index] for index in node.reads])
            values.update(zip(node.makes, made, strict=True))
            for index in self.program.kept.intersection(node.makes):
                setattr(self, f"kept{index}", values[index])
        return [values[index] for index in self.program.ends]

    def run(self, node: Node, given: list[Tensor]) -> tuple[Tensor, ...]:
        """Execute one node."""
        made = self.get_submodule(node.layer)(*given) if node.layer else FUNCTIONS[node.op](*given, **node.options)
        return made if isinstance(made, tuple) else (made,)

    def seen(self, x: Tensor) -> list[Tensor]:
        """All that a forward pass leaves behind: what it returns and what it keeps on the network."""
        with torch.no_grad():
            outputs = self(x.clone())
        return [*outputs, *(getattr(self, f"kept{index}") for index in sorted(self.program.kept))]


def _in_rows(x: Tensor, groups: int) -> Tensor:
    return x.view(len(x), groups, -1, *x.shape[2:]).transpose(1, 2).reshape(x.shape)


def _added(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "identity": lambda x: x,
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "relu": lambda x, inplace: F.relu(x, inplace=inplace),
    "tanh": lambda x: x.tanh(),
    "double": lambda x, inplace: x.mul_(2) if inplace else x * 2,
    "pad": lambda x, mode, left: F.pad(x, (left, 1) + (1, 0) * (x.dim() == 4), mode=mode),
    "avg_pool": lambda x, **options: getattr(F, f"avg_pool{x.dim() - 2}d")(x, **options),
    "max_pool": lambda x, **options: getattr(F, f"max_pool{x.dim() - 2}d")(x, **options),
    "mean": lambda x: x.mean((2, 3) if x.dim() == 4 else 2),
    "cat": lambda x, y: torch.cat([x, y], 1),
    "add": lambda x, y: x + y,
    "iadd": _added,
    "chunk": lambda x: x.chunk(2, 1),
    "narrow": lambda x, first, end: x[:, first:end],
    "shuffle": F.channel_shuffle,
    "shuffle_by_hand": _in_rows,
    "flatten": lambda x, first: x.flatten(first),
    "swap": lambda x: x.transpose(1, 2),
    "rows": lambda x: x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]) if x.dim() == 4 else x.flatten(0, 1),
}


class _Called(nn.Module):
    """A function as a module, such as torch has for pools and activations."""

    def __init__(self, op: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.op, self.options = op, options

    def forward(self, *given: Tensor) -> Any:
        return FUNCTIONS[self.op](*given, **self.options)


def _make_module(node: Node) -> nn.Module:
    options = node.options
    if node.op == "linear":
        return nn.Linear(**options)
    if node.op == "bn":
        return _make_norm(**options)
    if node.op not in ("conv", "conv_transpose"):
        return _Called(node.op, options)
    kind = "Conv" if node.op == "conv" else "ConvTranspose"
    return getattr(nn, f"{kind}{options['dims']}d")(
        **{key: value for key, value in options.items() if key != "dims"},
    )


def _make_norm(dims: int, num_features: int, kind: str, eps: float, values: str) -> nn.Module:
    if kind == "act":
        from timm.layers import BatchNormAct2d

        return BatchNormAct2d(num_features, eps=eps)
    if kind == "torchvision":
        return torchvision.ops.FrozenBatchNorm2d(num_features, eps=eps)
    if kind in ("frozen", "ghost"):
        return {"frozen": FrozenBatchNorm, "ghost": GhostBatchNorm}[kind](num_features, eps=eps)
    norm = getattr(nn, f"BatchNorm{dims}d")(
        num_features, eps=eps, affine=kind != "not affine", track_running_stats=kind != "no statistics"
    )
    if kind == "no bias":
        norm.register_parameter("bias", None)
    return norm


def _randomize(module: nn.Module, options: dict[str, Any], seed: int) -> None:
    """Mixed signs and a mean that is not zero; a shift of exactly zero, only positive scales or some of 0 on demand."""
    generator = torch.Generator().manual_seed(seed)
    values = options.get("values", "")
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if not tensor.is_floating_point():
                continue
            tensor.uniform_(-1, 1, generator=generator)
            if name == "running_var" or "positive" in values:
                tensor.abs_().add_(0.4)
            elif name == "weight" and "running_mean" in dict(module.named_buffers()):
                tensor.add_(0.4 * tensor.sign())
                if "zero scale" in values:
                    tensor[0] = 0
            if "no shift" in values and name in ("running_mean", "bias"):
                tensor.zero_()
    module.train(options.get("kind") == "training")
