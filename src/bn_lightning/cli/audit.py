"""Audit a network from the command line, with an exit code for CI."""

import sys
import warnings
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from bn_lightning.auditing import AuditReport, audit_batch_norm
from bn_lightning.cli.data import open_batches
from bn_lightning.cli.network import importable_here, inputs_for, name_patterns, open_network
from bn_lightning.errors import BatchNormError, first_line
from bn_lightning.zoo import find_callable

__all__ = ["audit"]

_FOUND = 3


def audit(
    model: str,
    checkpoint: str | None = None,
    data: str | None = None,
    data_options: dict[str, Any] | None = None,
    loss: str | None = None,
    batches: int = 32,
    fail_on: Literal["error", "warning", "info", "never"] = "error",
    html: str | None = None,
    input_size: str | None = None,
    include: list[str] | str = "",
    exclude: list[str] | str = "",
    pretrained: bool = False,
    num_classes: int | None = None,
    json: bool = False,
) -> None:
    """Tell why evaluation is worse than training, which BatchNorm layers do it, and the cure.

    Without --data only the network and one recorded forward pass are looked at.

    Args:
        model: timm:NAME, torchvision:NAME, package.module:callable, or package.module:LightningModuleClass with its
            Lightning checkpoint; modules of the working folder can be named too. For example:
            bn-lightning audit my.models:Classifier --checkpoint last.ckpt --data my.data:DataModule
        checkpoint: File of weights, or a Lightning checkpoint; read with weights_only=True.
        data: package.module:LightningDataModuleClass, or a function that gives training batches, or a pair of training
            and validation batches.
        data_options: Arguments of it, as a JSON object; a data module's own come from the checkpoint where it has them.
        loss: Of output and target: a name of torch.nn.functional, such as cross_entropy, or package.module:function, or
            a class of losses. A LightningModule's training_step is used if this is left out.
        batches: Audit over at most so many batches.
        fail_on: The least severe finding to exit with 3 for. Otherwise the exit code is 0; it is 1 if the audit could
            not be made, and 2 if an option is not known.
        html: Write a page with the picture of the gaps along the network to this file.
        input_size: Of one example, where there is no data, such as 3,224,224.
        include: Name patterns, with commas between, of the layers to audit; all if left out.
        exclude: Name patterns, with commas between, of layers to leave out.
        pretrained: Load the zoo's own weights, which may download them.
        num_classes: Of the classifier, where it is not the network's default.
        json: Print one JSON object and nothing else.
    """
    torch.manual_seed(0)  # a loader that shuffles gives CI the same batches each time
    with importable_here(model, data, loss):
        network = open_network(model, checkpoint=checkpoint, pretrained=pretrained, num_classes=num_classes)
        picked: dict[str, Any] = {"include": name_patterns(include), "exclude": name_patterns(exclude)}
        if data is None:
            report = audit_batch_norm(network, example_inputs=inputs_for(network, input_size), **picked)
        else:
            train, val = open_batches(data, data_options, checkpoint=checkpoint, network=network)
            report = audit_batch_norm(
                network, train, val_batches=val, max_batches=batches, **_judged(network, loss), **picked
            )
    _show(report, html, json)
    if fail_on != "never" and report.exit_code(fail_on):
        sys.exit(_FOUND)


def _show(report: AuditReport, html: str | None, json: bool) -> None:
    if json:
        print(report.to_json(), flush=True)
    else:
        report.print()
    if html is not None:
        try:
            report.save_html(html)
        except OSError as error:
            raise BatchNormError(f"the page {html!r} cannot be written ({first_line(error)}).") from error
        print(f"bn-lightning: the page is {html}", file=sys.stderr)


def _judged(network: nn.Module, loss: str | None) -> dict[str, Any]:
    """Return how the loss is read: by ``loss=``, or by a LightningModule's own step."""
    if loss is not None:
        named = find_callable(loss) if ":" in loss else getattr(F, loss, None)
        if not callable(named):
            raise BatchNormError(
                f"--loss takes a name of torch.nn.functional or package.module:function, got {loss!r}; for example "
                "cross_entropy."
            )
        return {"loss": named() if isinstance(named, type) else named}
    if not hasattr(network, "training_step"):
        return {}
    if not getattr(network, "automatic_optimization", False):
        print(
            f"bn-lightning: {type(network).__name__} optimizes by hand, so that its training_step cannot be asked for "
            "a loss; --loss gives one.",
            file=sys.stderr,
        )
        return {}

    def step(module: Any, batch: Any) -> Any:
        with warnings.catch_warnings():  # without a Trainer self.log does nothing but warn
            warnings.filterwarnings("ignore", message=".*self.log.*")
            return module.training_step(batch, 0)

    return {"step": step}
