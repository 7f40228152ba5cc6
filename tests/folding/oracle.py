"""What of a program can be folded, found out by trying.

The oracle knows nothing of recorded forward passes, of tags or of `bn_lightning`. It executes the program in float64
on inputs of its own and decides by what it measures there:

- *Which channel goes where* is measured by disturbing one channel of one layer at a time with noise, while every
  operation that does not pass channels on repeats what it returned before.
- *Whether a layer can go backward*: its effective scale and shift, which are measured too, are applied to the outputs
  of the layers that reach it, each channel with the scale of the channel where it arrives, the shift with each subset
  of those layers in turn; the layer itself hands on its input. The fold is right if nobody else notices: in a complete
  run every operation that does not merely pass channels on reads what it read before, and what is returned, kept or
  seen by a hook is what it was.
- *Whether it can go forward*: the readers' input channels are scaled likewise, and the bias of each is whatever is
  missing in their outputs then, if that is one number a channel.

A fold that was accepted is part of all later runs, so what it makes possible or impossible for others is found without
rules. Aliases and operations in place need no rules either: a layer that is gone returns its input itself.

What the library refuses although mathematics would let it go is a policy, and is modelled by `_Oracle.veto` and in
`PASSING`: each has a name there.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, combinations

import torch
from folding.programs import Node, Program
from torch import Tensor

__all__ = ["Verdict", "verdicts"]

LAYERS = ("conv", "conv_transpose", "linear")
SUMS = ("add", "iadd")
#: Which operations are looked through is a policy: through ReLU a positive scale without a shift could go.
PASSING = (
    "identity", "dropout", "pad", "avg_pool", "max_pool", "mean", "cat", "chunk", "narrow", "shuffle",
    "shuffle_by_hand", "flatten", "swap", "rows", *SUMS,
)  # fmt: skip
#: They normalize by the batch.
UNFOLDABLE = ("training", "no statistics")
#: These keep their weights in ways of their own and take nothing up.
VARIANTS = ("frozen",)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of one BatchNorm layer.

    Attributes:
        action: ``folded-backward, merged, folded-forward`` or ``kept``.
        into: The layers that take it up.
        vetoes: The policies for which it stays although it could go, if there are any.
    """

    action: str
    into: frozenset[str] = frozenset()
    vetoes: tuple[str, ...] = ()


def verdicts(program: Program) -> dict[str, Verdict]:
    """Decide on every BatchNorm layer: all of them backward in the order of execution, then the others forward."""
    oracle = _Oracle(program)
    names = [name for name, node in program.layers.items() if node.op == "bn"]
    found = {name: Verdict("kept", vetoes=("own",)) for name in names if name not in oracle.foldable}
    for direction in (oracle.backward, oracle.forward):
        for name in oracle.foldable:
            if name not in oracle.state.gone:
                before = found.get(name, Verdict("kept"))
                verdict = direction(name)
                found[name] = replace(verdict, vetoes=(*before.vetoes, *verdict.vetoes))
    return found


@dataclass(frozen=True, slots=True)
class _State:
    """What is folded so far.

    Attributes:
        gone: Layers that hand on their input.
        scaled: Layer to what its input channels are multiplied by.
        applied: Layer to the scale and shift of its outputs.
    """

    gone: frozenset[str] = frozenset()
    scaled: Mapping[str, Tensor] = field(default_factory=dict)
    applied: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def without(self, name: str) -> "_State":
        return replace(self, gone=self.gone | {name})

    def with_input(self, name: str, scale: Tensor) -> "_State":
        return replace(self, scaled={**self.scaled, name: self.scaled.get(name, 1.0) * scale})

    def with_output(self, name: str, scale: Tensor, shift: Tensor) -> "_State":
        own, added = self.applied.get(name, (torch.ones_like(scale), torch.zeros_like(scale)))
        return replace(self, applied={**self.applied, name: (own * scale, added * scale + shift)})


@dataclass(slots=True)
class _Run:
    """What every operation of one run read and made, copied at that time, and what was left in the end."""

    read: dict[int, list[Tensor]] = field(default_factory=dict)
    made: dict[int, list[Tensor]] = field(default_factory=dict)
    proper: dict[int, Tensor | None] = field(default_factory=dict)
    left: list[Tensor] = field(default_factory=list)
    bases: list[int] = field(default_factory=list)


class _Oracle:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.network = program.build(hooks=False)
        self.calls: dict[str, list[int]] = {}
        for number, node in enumerate(program.nodes):
            self.calls.setdefault(node.layer, []).append(number)
        self.kinds = {name: node.options["kind"] for name, node in program.layers.items() if node.op == "bn"}
        self.foldable = [
            name for name, kind in self.kinds.items() if kind not in UNFOLDABLE and name not in program.hooks
        ]
        self.input = torch.randn(3, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
        self.state = _State()

    def backward(self, name: str) -> Verdict:
        """Try to fold a layer into what makes its input."""
        base = self._run(self.state)
        arrivals: dict[str, list[set[int]]] = {}
        for maker, node in self.program.layers.items():
            if maker == name or maker in self.state.gone or not self._takes_up(node) or self._acts(maker):
                continue
            made = base.proper[self.calls[maker][0]]
            if not self._arriving(base, name, maker, range(made.shape[_axis(node)])):
                continue
            channels = range(made.shape[_axis(node)])
            arrivals[maker] = [self._arriving(base, name, maker, [channel]) for channel in channels]
        if not arrivals or any(len(reached) > 1 for each in arrivals.values() for reached in each):
            return Verdict("kept")
        scale, shift = self._effect(name)
        for shifted in _subsets(arrivals):
            trial = self.state.without(name)
            for maker, reached in arrivals.items():
                a, b = _spread(reached, scale, 1.0), _spread(reached, shift, 0.0)
                trial = trial.with_output(maker, a, b if maker in shifted else torch.zeros_like(b))
            if self._unnoticed(base, self._run(trial), trial, name, PASSING, [name]):
                merged = all(self.program.layers[maker].op == "bn" for maker in arrivals)
                return self._accepted(
                    "merged" if merged else "folded-backward", name, base, trial, arrivals, forward=False
                )
        return Verdict("kept")

    def forward(self, name: str) -> Verdict:
        """Try to fold a layer into what reads its output."""
        if self._acts(name):
            return Verdict("kept")
        through = tuple(op for op in PASSING if op not in SUMS)
        base, trial = self._run(self.state), self.state.without(name)
        scale, _ = self._effect(name)
        arrivals: dict[str, list[set[int]]] = {}
        for channel in range(len(scale)):
            noisy = self._run(self.state, frozen=base, noise=(name, [channel]), through=through)
            for number, node in enumerate(self.program.nodes):
                if node.layer not in trial.gone and self._takes_up(node):
                    rows = base.read[number][0].movedim(_axis(node), 0)
                    reached = arrivals.setdefault(node.layer, [set() for _ in rows])
                    for row in _differing(rows, noisy.read[number][0].movedim(_axis(node), 0)):
                        reached[row].add(channel)
        arrivals = {taker: reached for taker, reached in arrivals.items() if any(reached)}
        if not arrivals or any(len(reached) > 1 for each in arrivals.values() for reached in each):
            return Verdict("kept")
        for taker, reached in arrivals.items():
            trial = trial.with_input(taker, _spread(reached, scale, 1.0))
        for taker in arrivals:
            number = self.calls[taker][0]
            missing = base.proper[number] - self._run(trial).proper[number]
            missing = missing.movedim(_axis(self.program.layers[taker]), 0).flatten(1).mean(1)
            trial = trial.with_output(taker, torch.ones_like(missing), missing)
        if not self._unnoticed(base, self._run(trial), trial, name, through, arrivals):
            return Verdict("kept")
        merged = all(self.program.layers[taker].op == "bn" for taker in arrivals)
        return self._accepted("merged" if merged else "folded-forward", name, base, trial, arrivals, forward=True)

    def _accepted(
        self, action: str, name: str, base: _Run, trial: _State, partners: Iterable[str], *, forward: bool
    ) -> Verdict:
        """Take up a fold that is right, unless a policy is against it."""
        vetoes = tuple(self._vetoes(name, base, self._run(trial), partners, forward=forward))
        if vetoes:
            return Verdict("kept", vetoes=vetoes)
        self.state = trial
        return Verdict(action, frozenset(partners))

    def _vetoes(self, name: str, base: _Run, after: _Run, partners: Iterable[str], *, forward: bool) -> Iterable[str]:
        """Name the policies against a fold that is right."""
        for partner in partners:
            if partner in self.program.hooks:
                yield f"hook on the partner {partner}"
            if self.kinds.get(partner) in VARIANTS:
                yield f"{partner} is a variant, which takes nothing up"
        for hooked in self.program.hooks:
            for number in self.calls.get(hooked, ()):
                if not _same(base.read[number] + base.made[number], after.read[number] + after.made[number]):
                    yield f"the hook on {hooked} sees another value"
        for number in base.bases:
            if not _same(base.made[number], after.made[number]):
                yield "a view of a value that changes is left, and keeps it alive"
        for maker, reader in ((name, each) if forward else (each, name) for each in partners):
            if not self._whole(base, maker, reader):
                yield f"{reader} reads {maker} averaged with zeros or more than once"

    def _whole(self, base: _Run, maker: str, reader: str) -> bool:
        """Whether every place of a layer's input counts each channel of another layer once or not at all."""
        ones = replace(base, made={number: [0 * each for each in made] for number, made in base.made.items()})
        for number in self.calls[maker]:
            ones.made[number] = [torch.ones_like(each) for each in base.made[number]]
        counts = [self._run(self.state, frozen=ones, silent=True).read[number][0] for number in self.calls[reader]]
        return all(bool(((each == 0) | ((each - 1).abs() < 1e-9)).all()) for each in counts)

    def _takes_up(self, node: Node) -> bool:
        """Whether it is a layer that may take up another's work."""
        return node.op in LAYERS or node.layer in self.foldable

    def _acts(self, name: str) -> bool:
        """Whether an activation belongs to a layer."""
        return self.kinds.get(name) == "act"

    def _arriving(self, base: _Run, name: str, maker: str, channels: Iterable[int]) -> set[int]:
        """Tell which channels of a layer's input change with channels of another layer's output."""
        noisy = self._run(self.state, frozen=base, noise=(maker, channels), through=PASSING)
        return {
            row
            for number in self.calls[name]
            for row in _differing(base.read[number][0].movedim(1, 0), noisy.read[number][0].movedim(1, 0))
        }

    def _effect(self, name: str) -> tuple[Tensor, Tensor]:
        """Measure a layer's scale and shift, as it is after the folds so far."""
        node = self.program.layers[name]
        ones = torch.ones(1, node.options["num_features"], *[1] * (node.options["dims"]), dtype=torch.float64)
        at_zero = self._affine(self.state, node, 0 * ones).flatten()
        return self._affine(self.state, node, ones).flatten() - at_zero, at_zero

    def _unnoticed(
        self, base: _Run, after: _Run, trial: _State, name: str, through: tuple[str, ...], settled: Iterable[str]
    ) -> bool:
        """Whether nobody reads anything else than before, but for those who pass it on or make up for it."""
        for number, node in enumerate(self.program.nodes):
            if node.layer in settled:
                unchanged = _same([base.proper[number]], [after.proper[number]])
            elif node.layer == name or self._passes(trial, node, through):
                continue
            else:
                unchanged = _same(base.read[number], after.read[number])
            if not unchanged:
                return False
        return _same(base.left, after.left)

    def _passes(self, state: _State, node: Node, through: tuple[str, ...]) -> bool:
        return node.op in through or (node.layer in state.gone and not self._acts(node.layer))

    def _run(
        self,
        state: _State,
        frozen: _Run | None = None,
        noise: tuple[str, Iterable[int]] = ("", ()),
        through: tuple[str, ...] = PASSING,
        silent: bool = False,
    ) -> _Run:
        """Execute the program.

        Args:
            state: With what is folded.
            frozen: A run whose results are repeated by every operation that does not pass channels on.
            noise: A layer and those of its channels that are disturbed.
            through: The operations that pass channels on.
            silent: Whether the network is given zeros.
        """
        run, values = _Run(), {0: (0 if silent else 1) * self.input}
        for number, node in enumerate(self.program.nodes):
            given = [values[index] for index in node.reads]
            run.read[number] = [each.clone() for each in given]
            if frozen is None or self._passes(state, node, through):
                made, run.proper[number] = self._execute(state, node, given)
            else:
                made = [each.clone() for each in frozen.made[number]]
                if node.options.get("inplace") or node.op == "iadd" or node.layer in state.gone:
                    made = [given[0].copy_(made[0])]
            if node.layer and node.layer == noise[0]:
                made = [_disturbed(made[0], _axis(node), noise[1])]
            run.made[number] = [each.clone() for each in made]
            values.update(zip(node.makes, made, strict=True))
        left = [values[index] for index in (*self.program.ends, *sorted(self.program.kept))]
        run.left = [each.clone() for each in left]
        held = {id(each._base) for each in left} - {id(each) for each in left}
        run.bases = [
            number
            for number, node in enumerate(self.program.nodes)
            if held & {id(values[index]) for index in node.makes}
        ]
        return run

    def _execute(self, state: _State, node: Node, given: list[Tensor]) -> tuple[list[Tensor], Tensor | None]:
        """Execute an operation; also return what a layer gives before its activation."""
        if not self._takes_up(node):
            return list(self.network.run(node, given)), None
        made = self._affine(state, node, given[0])
        proper = made.clone()
        return [self.network.get_submodule(node.layer).act(made) if self._acts(node.layer) else made], proper

    def _affine(self, state: _State, node: Node, x: Tensor) -> Tensor:
        """Execute a layer with what it has taken up."""
        layer, axis = self.network.get_submodule(node.layer), _axis(node)
        if node.layer in state.gone:
            return x  # itself, not a copy: what is done to it in place is done to the input
        if node.layer in state.scaled:
            x = x * _along(state.scaled[node.layer], x, axis)
        if node.op != "bn":
            y = layer(x)
        else:
            y = (x - _along(layer.running_mean, x)) / _along((layer.running_var + layer.eps).sqrt(), x)
            y = y if layer.weight is None else y * _along(layer.weight, x)
            y = y if layer.bias is None else y + _along(layer.bias, x)
        if node.layer in state.applied:
            scale, shift = state.applied[node.layer]
            y = y * _along(scale, y, axis) + _along(shift, y, axis)
        return y


def _axis(node: Node) -> int:
    return -1 if node.op == "linear" else 1


def _along(channels: Tensor, x: Tensor, axis: int = 1) -> Tensor:
    return channels if axis == -1 else channels.view(-1, *[1] * (x.dim() - 2))


def _spread(reached: list[set[int]], values: Tensor, neutral: float) -> Tensor:
    """Give each partner's channel the value of the layer's channel that it belongs to."""
    return torch.stack([values[min(each)] if each else torch.tensor(neutral).to(values) for each in reached])


def _subsets(names: Iterable[str]) -> Iterable[set[str]]:
    ordered = list(names)
    sizes = range(len(ordered), -1, -1)
    return map(set, chain.from_iterable(combinations(ordered, size) for size in sizes))


def _disturbed(x: Tensor, axis: int, channels: Iterable[int]) -> Tensor:
    noise = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(3)) * 3 * (1 + x.abs().max())
    only = torch.zeros(x.shape[axis], dtype=x.dtype)
    only[list(channels)] = 1
    return x + noise * _along(only, x, axis)


def _differing(before: Tensor, after: Tensor) -> list[int]:
    """List the rows that differ."""
    distance = (before - after).flatten(1).abs().amax(1)
    return (distance > 1e-8 * (1 + before.abs().max())).nonzero().flatten().tolist()


def _same(before: list[Tensor], after: list[Tensor]) -> bool:
    return all(
        a.shape == b.shape and bool((a - b).abs().max() <= 1e-8 * (1 + a.abs().max()))
        for a, b in zip(before, after, strict=True)
    )
