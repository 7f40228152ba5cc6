"""Programs drawn by hypothesis.

A program comes from a list of `Step`s, small integers without a memory. Whatever the integers, what they lead to is a
valid program (a step that cannot be taken is left out), and smaller integers stand for the simpler choice. So leaving
out steps and making numbers smaller, which is all that shrinking does, leads to simpler programs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from folding.programs import FUNCTIONS, Node, Program
from hypothesis import strategies as st

__all__ = ["CHANNELS", "SIZE", "Step", "programs", "written"]

CHANNELS, SIZE = 4, 6
_WIDEST = {4: 12, 3: 40, 2: 150}
_LARGEST = 4000


class Step(NamedTuple):
    """What is done next.

    Attributes:
        op: What.
        back: To which value, counted from the newest.
        other: Beside which other one, likewise; or with which layer.
        choices: Between its options.
    """

    op: str
    back: int = 0
    other: int = 0
    choices: tuple[int, ...] = ()


def programs(max_steps: int = 12) -> st.SearchStrategy[Program]:
    """Draw a program with at least one BatchNorm layer."""
    step = st.builds(
        Step,
        st.sampled_from([op for op, weight in _WEIGHTS.items() for _ in range(weight)]),
        st.sampled_from([0, 0, 0, 0, 0, 0, 1, 1, 2, 3, 5]),
        st.integers(0, 5),
        st.tuples(*[st.integers(0, 59)] * 7),
    )
    steps = st.lists(step, min_size=2, max_size=max_steps)
    drawn = st.builds(written, steps, st.integers(0, 99))
    return drawn.filter(lambda program: any(node.op == "bn" for node in program.nodes))


def written(steps: list[Step], seed: int = 0) -> Program:
    """Turn steps into a program."""
    writer = _Writer(seed)
    for step in steps:
        writer.take(step)
    return writer.program


class _Writer:
    """Runs each node once, to know the shapes and leave out what cannot run."""

    def __init__(self, seed: int) -> None:
        self.program = Program(seed=seed)
        self.shapes = [torch.Size((2, CHANNELS, SIZE, SIZE))]

    def take(self, step: Step) -> None:
        newest = len(self.shapes) - 1
        value, other = max(0, newest - step.back), max(0, newest - step.back - 1 - step.other)
        draw = _Choices(step.choices)
        if step.op in ("keep", "return"):
            (self.program.kept if step.op == "keep" else self.program.returned).update({value} - {0})
        elif step.op in ("cat", "add", "iadd"):
            self._append(step.op, (other, value) if draw(True, False) else (value, other))
        elif step.op in ("again", "hook"):
            self._at_a_layer(step, value, draw)
        elif step.op == "fork":
            self._fork(value, step.choices)
        else:
            for op, options in _OPTIONS[step.op](draw, self.shapes[value]):
                own = op not in FUNCTIONS or draw(False, False, True)
                self._append(op, (value,), f"{op}{len(self.program.nodes)}" if own else "", options)

    def _at_a_layer(self, step: Step, value: int, draw: "_Choices") -> None:
        names = list(self.program.layers)[::-1]
        if names and step.op == "hook":
            self.program.hooks[names[step.other % len(names)]] = draw("forward_hook", "forward_pre_hook")
        elif names:
            node = self.program.layers[names[step.other % len(names)]]
            self._append(node.op, (value,), node.layer, node.options)

    def _fork(self, value: int, choices: tuple[int, ...]) -> None:
        """Two convolutions of one value, put together again."""
        draw = _Choices(choices)
        together, single = draw("add", "cat", "iadd"), draw(False, True)
        made = []
        for number in range(2):
            for op, options in _convolution(_Choices((*choices[2:5], 0, 0)), self.shapes[value]):
                before = len(self.shapes)
                if single and number and "bias" in options:
                    options |= {"bias": False}
                self._append(op, (value,), f"{op}{len(self.program.nodes)}", options)
                made += range(before, len(self.shapes))
        if len(made) == 2:
            self._append(together, tuple(made if draw(True, False) else made[::-1]))

    def _append(self, op: str, reads: tuple[int, ...], layer: str = "", options: dict[str, Any] | None = None) -> None:
        node = Node(op, reads, (), layer, options or {})
        given = [torch.randn(self.shapes[index], dtype=torch.float64) for index in reads]
        try:
            with torch.no_grad():
                made = Program([node]).build().run(node, given)
        except (RuntimeError, ValueError, TypeError, AssertionError, AttributeError, IndexError):
            return
        if not all(
            0 < each.numel() < _LARGEST and each.dim() > 1 and each.shape[1] <= _WIDEST[each.dim()] for each in made
        ):
            return
        makes = tuple(range(len(self.shapes), len(self.shapes) + len(made)))
        self.program.nodes.append(Node(op, reads, makes, layer, node.options))
        self.shapes += [each.shape for each in made]


class _Choices:
    """Takes one of the values it is called with for each of some integers, the first for 0."""

    def __init__(self, numbers: tuple[int, ...]) -> None:
        self._numbers = iter(numbers)

    def __call__(self, *values: Any) -> Any:
        return values[next(self._numbers, 0) % len(values)]


_Options = list[tuple[str, dict[str, Any]]]


def _convolution(draw: _Choices, shape: torch.Size) -> _Options:
    channels, dims = shape[1], len(shape) - 2
    if dims < 1:
        return _linear(draw, shape)
    kernel = draw(1, 3)
    mode, padding = draw(
        ("zeros", 0), ("zeros", 1), ("zeros", "same"), ("reflect", 1), ("replicate", 1), ("circular", 1)
    )
    groups = draw(1, 1, 2, channels) if channels % 2 == 0 and channels <= _WIDEST[4] else 1
    options = {"dims": dims, "in_channels": channels, "out_channels": draw(4, 6) if groups < 3 else channels}
    options |= {"kernel_size": kernel, "padding": padding, "padding_mode": mode, "groups": groups}
    return [("conv", options | {"bias": draw(True, False), "stride": 1 if padding == "same" else draw(1, 1, 2)})]


def _linear(draw: _Choices, shape: torch.Size) -> _Options:
    return [("linear", {"in_features": shape[-1], "out_features": draw(4, 6), "bias": draw(True, False)})]


def _transposed(draw: _Choices, shape: torch.Size) -> _Options:
    dims, kernel, groups = len(shape) - 2, draw(1, 3), draw(1, 2)
    if dims < 1 or shape[1] % groups:
        return []
    options = {"dims": dims, "in_channels": shape[1], "out_channels": draw(4, 6), "kernel_size": kernel}
    options |= {"groups": groups, "stride": draw(1, 2), "padding": draw(0, 1) if kernel > 1 else 0}
    return [("conv_transpose", options | {"bias": draw(True, False)})]


def _norm(draw: _Choices, shape: torch.Size) -> _Options:
    kinds = ["plain"] * 6 + ["not affine", "not affine", "no bias", "frozen", "ghost", "no statistics", "training"]
    kind = draw(*kinds, *["torchvision", "act"] * (len(shape) == 4))
    options = {"dims": max(1, len(shape) - 2), "num_features": shape[1], "kind": kind, "eps": draw(1e-5, 0.1)}
    return [("bn", options | {"values": draw("", "", "no shift", "positive", "positive", "zero scale", "no shift")})]


def _pool(draw: _Choices, shape: torch.Size) -> _Options:
    if len(shape) < 3:
        return []
    kind, size, padding = draw("avg_pool", "max_pool"), draw(2, 3), draw(0, 1)
    options = {"kernel_size": size, "padding": padding, "stride": draw(2, 1)}
    return [(kind, options | ({"count_include_pad": draw(False, True)} if kind == "avg_pool" else {}))]


def _moved(draw: _Choices, shape: torch.Size) -> _Options:
    half, by_hand = shape[1] // 2, draw("shuffle", "shuffle_by_hand")
    part = draw((0, half), (half, shape[1]), (0, half + 1))
    return [draw(("chunk", {}), ("narrow", {"first": part[0], "end": part[1]}), (by_hand, {"groups": 2}))]


def _reshaped(draw: _Choices, shape: torch.Size) -> _Options:
    return [draw(("flatten", {"first": 2}), ("flatten", {"first": 1}), ("rows", {}), ("swap", {}), ("mean", {}))]


def _fixed(op: str, **options: Any) -> Callable[[_Choices, torch.Size], _Options]:
    return lambda draw, shape: [(op, options)]


def _relu(draw: _Choices, shape: torch.Size) -> _Options:
    return [("relu", {"inplace": draw(False, True)})]


def _double(draw: _Choices, shape: torch.Size) -> _Options:
    return [("double", {"inplace": draw(False, True)})]


def _pad(draw: _Choices, shape: torch.Size) -> _Options:
    return [("pad", {"mode": draw("constant", "reflect", "replicate", "circular"), "left": draw(1, 0)})]


_OPTIONS = {
    "conv": _convolution,
    "linear": _linear,
    "transposed": _transposed,
    "bn": _norm,
    "relu": _relu,
    "tanh": _fixed("tanh"),
    "double": _double,
    "pad": _pad,
    "pool": _pool,
    "moved": _moved,
    "reshaped": _reshaped,
    "identity": _fixed("identity"),
    "dropout": _fixed("dropout"),
}
# fmt: off
_WEIGHTS = {
    "bn": 10, "conv": 6, "transposed": 2, "linear": 1, "fork": 3, "relu": 3, "tanh": 1, "double": 1, "pad": 2,
    "pool": 3, "moved": 4, "reshaped": 2, "identity": 1, "dropout": 1, "cat": 2, "add": 2, "iadd": 1, "again": 2,
    "hook": 1, "keep": 1, "return": 1,
}
# fmt: on
