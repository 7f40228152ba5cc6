"""The passes of an audit: which modes each runs in, and what loss each batch gives."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from glob import escape
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.auditing.attribution import Attribution
from bn_lightning.auditing.observer import Observer, observed_batch
from bn_lightning.auditing.own_batch import by_own_batch
from bn_lightning.errors import SingleValueError
from bn_lightning.layers.frozen import FrozenBatchNorm
from bn_lightning.layers.paused import paused_statistics
from bn_lightning.preservation import eagerly, out_of_inference_mode
from bn_lightning.recalibration import LayerPopulation, population_statistics
from bn_lightning.recalibration.run import Run, as_given, examples_in, same_randomness

__all__ = ["Passes"]

Statistics = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(slots=True)
class Passes:
    """Runs a borrowed network over batches; whoever borrows it wraps all of them in `preservation.preserved`.

    Attributes:
        network: Unwrapped.
        layers: The selected BN layers.
        run: How it is run.
        observers: What watches.
        single_values: What was told of batches that give a layer one value per channel, which are left out.
    """

    network: nn.Module
    layers: Mapping[str, _BatchNorm]
    run: Run
    observers: Sequence[Observer] = ()
    single_values: list[SingleValueError] = field(default_factory=list)
    _devices: set[torch.device] = field(init=False)

    def __post_init__(self) -> None:
        self._devices = {tensor.device for tensor in (*self.network.parameters(), *self.network.buffers())}

    def population(
        self, batches: Sequence[Any], name: str, *, reads: bool
    ) -> tuple[dict[str, LayerPopulation], list[float | None]]:
        """Measure population statistics, the selected layers by batch statistics and all else in evaluation mode.

        Args:
            batches: Those to run.
            name: Of the pass.
            reads: Whether its losses are wanted.

        Returns:
            The populations, and a loss for each batch; ``None`` for one that was left out.
        """
        run = self.run if reads or self.run.step is not None else replace(self.run, loss=None)
        losses: list[float | None] = []
        watching = [observer for observer in self.observers if name in observer.passes]

        def forward(network: nn.Module, batch: Any) -> None:
            losses.append(None)
            self._begin(len(losses) - 1)
            with as_given(batch), observed_batch(watching):
                losses[-1] = _number(run(network, batch), batch)

        with ExitStack() as stack:
            self._watch(stack, watching, name)
            populations = population_statistics(
                self.network,
                batches,
                max_batches=max(len(batches), 1),
                forward=forward,
                include=tuple(map(escape, self.layers)),  # names, not patterns
                on_single_value=self.single_values.append,
            )
        return populations, losses

    def training(self, batches: Sequence[Any]) -> list[float | None]:
        """Read the losses in training mode; running statistics stand still.

        Modes are as they are if the network is in training mode; else everything trains but `FrozenBatchNorm`. Layers
        that share statistics with other processes go by this one's batch, as those may have other numbers of batches.
        """
        was_training = self.network.training
        modes = {module: module.training for module in self.network.modules()}

        def mode(module: nn.Module) -> bool:
            return modes[module] if was_training else not isinstance(module, FrozenBatchNorm)

        with self._modes(mode), paused_statistics(self.network):
            return self._losses(batches, "full_training", within=by_own_batch(self.network))

    def evaluation(
        self, batches: Sequence[Any], name: str, statistics: Statistics, attribution: Attribution | None = None
    ) -> list[float | None]:
        """Read the losses in evaluation mode with some layers' running statistics replaced.

        Args:
            batches: Those to run.
            name: Of the pass.
            statistics: Layer to the mean and variance it is to have; the others keep theirs.
            attribution: Takes in a backward pass of each batch.
        """
        at = nullcontext() if attribution is None else attribution.at(self.layers)
        with self._modes(lambda module: False), self._replaced(statistics), at:
            return self._losses(batches, name, attribution)

    def _losses(
        self,
        batches: Sequence[Any],
        name: str,
        attribution: Attribution | None = None,
        within: AbstractContextManager[None] | None = None,
    ) -> list[float | None]:
        losses: list[float | None] = []
        backward = attribution is not None and attribution.problem is None
        # A pass without the gradients that observers expect of it is not the pass they know.
        watching = [each for each in self.observers if name in each.passes and backward is (attribution is not None)]
        with ExitStack() as stack:
            self._watch(stack, watching, name)
            stack.enter_context(within or nullcontext())
            stack.enter_context(out_of_inference_mode())
            stack.enter_context(eagerly())
            stack.enter_context(torch.set_grad_enabled(backward))
            for index, batch in enumerate(batches):
                self._begin(index)
                try:
                    with as_given(batch), observed_batch(watching):
                        loss = self.run(self.network, batch)
                        if attribution is not None and loss is not None and examples_in(batch):
                            attribution.add(loss, examples_in(batch))
                    losses.append(_number(loss, batch))
                except ValueError as error:
                    if not _is_single_value(error):
                        raise
                    losses.append(None)
                loss = None  # its graph would live on beside that of the next batch
        return losses

    def _begin(self, index: int) -> None:
        same_randomness(index, self._devices)

    def _watch(self, stack: ExitStack, watching: Sequence[Observer], name: str) -> None:
        for observer in watching:
            stack.enter_context(observer.watching(self.network, self.layers, name))

    @contextmanager
    def _modes(self, mode: Callable[[nn.Module], bool]) -> Iterator[None]:
        before = {module: module.training for module in self.network.modules()}
        try:
            for module in before:
                module.training = mode(module)  # not .train(): an overridden one may rebuild the module
            yield
        finally:
            for module, training in before.items():
                module.training = training

    @contextmanager
    def _replaced(self, statistics: Statistics) -> Iterator[None]:
        with ExitStack() as stack:
            for name, (mean, var) in statistics.items():
                buffers = self.layers[name]._buffers
                own_mean, own_var = buffers["running_mean"], buffers["running_var"]
                assert own_mean is not None
                assert own_var is not None
                # Other tensors, not other values: a backward pass that still waits may need the present ones.
                stack.callback(buffers.update, running_mean=own_mean, running_var=own_var)
                buffers.update(running_mean=mean.to(own_mean), running_var=var.to(own_var))
            yield


def _number(loss: Tensor | None, batch: Any) -> float | None:
    """Read a loss; a batch without examples has none, whatever their mean came out as."""
    return None if loss is None or not examples_in(batch) else float(loss.detach())


def _is_single_value(error: ValueError) -> bool:
    """Tell whether torch or a layer of ours refuses a batch that gives one value per channel."""
    return "more than 1 value per channel" in str(error) or "more than one value per channel" in str(error)
