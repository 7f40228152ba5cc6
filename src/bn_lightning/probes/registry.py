"""Probes by name, for one batch at a time, each with the passes that it takes."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from bn_lightning.errors import BatchNormError, nearest
from bn_lightning.probes.branch_variance import branch_variance
from bn_lightning.probes.channel_moments import channel_moments_by_depth
from bn_lightning.probes.covariate_shift import internal_covariate_shift
from bn_lightning.probes.gradient_coherence import gradient_coherence
from bn_lightning.probes.gradient_line import effective_smoothness, gradient_predictiveness, loss_landscape
from bn_lightning.probes.gradient_norms import gradient_norms_by_depth
from bn_lightning.probes.gradient_tails import gradient_tails
from bn_lightning.probes.objective import Step
from bn_lightning.probes.percentiles import activation_percentiles
from bn_lightning.probes.relative_loss import relative_loss
from bn_lightning.probes.stable_learning_rate import max_stable_learning_rate, most_runs
from bn_lightning.probes.weights import is_weight_layer
from bn_lightning.selection import select_modules

__all__ = ["Passes", "ProbeCall", "probe_call"]

Options = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Passes:
    """How many passes through the network a probe takes.

    Attributes:
        forward: At most so many.
        backward: Likewise.
    """

    forward: int
    backward: int

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(self.forward + other.forward, self.backward + other.backward)


@dataclass(frozen=True, slots=True)
class ProbeCall:
    """A probe with its options; made by `probe_call`.

    Attributes:
        name: Of the function.
        options: Its own, such as ``points``.
    """

    name: str
    options: Options

    @property
    def uses_learning_rate(self) -> bool:
        """Whether it takes steps that are multiples of the training's."""
        return "learning_rate" in _known(self.name)

    @property
    def may_differ_between_processes(self) -> bool:
        """Whether the number of its passes depends on the losses, which are each process's own."""
        return self.name == "max_stable_learning_rate"

    def passes(self, network: nn.Module) -> Passes:
        """State its passes beforehand."""
        options = {key: given.default for key, given in _known(self.name).items()} | dict(self.options)
        return _PROBES[self.name][1](network, options)

    def measure(self, network: nn.Module, batch: Any, step: Step, learning_rate: float) -> Any:
        """Run it.

        Args:
            network: Which one.
            batch: One.
            step: A function ``(network, batch) -> loss``.
            learning_rate: The training's, unless the options have another.
        """
        options = dict(self.options)
        if self.uses_learning_rate:
            options.setdefault("learning_rate", learning_rate)
        function, _, without_loss = _PROBES[self.name]
        if self.name == "max_stable_learning_rate":
            batch = [batch]
        return function(network, *(() if without_loss else (None,)), batch, step=step, **options)


def probe_call(name: str, options: Options | None = None) -> ProbeCall:
    """Look up a probe.

    Raises:
        BatchNormError: If there is none of that name for one batch, or it has no such option.

    Example:
        >>> probe_call("loss_landscape", {"points": 4}).passes(nn.Linear(2, 2))
        Passes(forward=5, backward=1)
    """
    if name == "population_gap":
        raise BatchNormError(
            "population_gap needs many batches, not the current one alone: call bn_lightning.probes.population_gap."
        )
    if name not in _PROBES:
        there = ", ".join(map(repr, _PROBES))
        raise BatchNormError(f"no probe is called {name!r}{nearest(name, _PROBES)}; there are {there}.")
    known = _known(name)
    for option in options or ():
        if option not in known:
            raise BatchNormError(
                f"{name} has no option {option!r}{nearest(option, known)}; it has {', '.join(known) or 'none'}."
            )
    return ProbeCall(name, dict(options or {}))


def _known(name: str) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(_PROBES[name][0]).parameters
    return {key: each for key, each in parameters.items() if each.kind is each.KEYWORD_ONLY and key != "step"}


def _once(network: nn.Module, options: Options) -> Passes:
    return Passes(1, 1)


def _forward(network: nn.Module, options: Options) -> Passes:
    return Passes(1, 0)


def _landscape(network: nn.Module, options: Options) -> Passes:
    return Passes(options["points"] + 1, 1)


def _line(network: nn.Module, options: Options) -> Passes:
    return Passes(options["points"] + 1, options["points"] + 1)


def _layers(network: nn.Module, options: Options) -> Passes:
    layers = select_modules(network, options["include"], options["exclude"], where=is_weight_layer)
    count = sum(bool(layer.weight.requires_grad) for layer in layers.values())
    return Passes(max(count, 1), max(count, 1))


def _runs(network: nn.Module, options: Options) -> Passes:
    count = options["steps"] * most_runs(options["low"], options["high"], options["ratio"])
    return Passes(count, count)


# The function, its passes, and whether it takes no loss.
_PROBES: dict[str, tuple[Callable[..., Any], Callable[[nn.Module, Options], Passes], bool]] = {
    "loss_landscape": (loss_landscape, _landscape, False),
    "gradient_predictiveness": (gradient_predictiveness, _line, False),
    "effective_smoothness": (effective_smoothness, _line, False),
    "relative_loss": (relative_loss, _landscape, False),
    "internal_covariate_shift": (internal_covariate_shift, _layers, False),
    "gradient_coherence": (gradient_coherence, _once, False),
    "gradient_tails": (gradient_tails, _once, False),
    "gradient_norms_by_depth": (gradient_norms_by_depth, _once, False),
    "channel_moments_by_depth": (channel_moments_by_depth, _forward, True),
    "activation_percentiles": (activation_percentiles, _forward, True),
    "branch_variance": (branch_variance, _forward, True),
    "max_stable_learning_rate": (max_stable_learning_rate, _runs, False),
}
