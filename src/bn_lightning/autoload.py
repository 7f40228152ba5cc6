"""Callbacks switched on from the environment, in a project that does not know this library.

``BN_LIGHTNING="monitor;activations:every_n_steps=10,first_steps=5;audit" python train.py`` adds them to every Trainer
of the run, through the entry points at which both Lightning families ask for callbacks. Without the variable nothing is
added, and nothing but this file is imported.
"""

import inspect
import os
import sys
from typing import Any

from bn_lightning.errors import BatchNormError, first_line, nearest

__all__ = ["VARIABLE", "callbacks_of", "from_environment"]

VARIABLE = "BN_LIGHTNING"
_NAMES = {
    "activations": "ActivationMonitor",
    "audit": "BatchNormAudit",
    "convert": "ConvertBatchNorm",
    "fold": "FoldBatchNorm",
    "freeze": "FreezeBatchNorm",
    "monitor": "BatchNormMonitor",
    "probe": "OptimizationProbe",
    "recalibrate": "RecalibrateBatchNorm",
}
_SUFFIX = "FromEnvironment"
_OPENING, _CLOSING = "[{(", "]})"
# How often callbacks were asked for, and which of these calls made those that were set up last.
_calls = {"made": 0, "set up": 0}


def from_environment() -> list[Any]:
    """Return the callbacks that the variable ``BN_LIGHTNING`` asks for; Lightning calls this for each Trainer.

    Raises:
        BatchNormError: If the variable names an unknown callback or option, or a value that is refused.
    """
    asked = os.environ.get(VARIABLE, "").strip()
    return callbacks_of(asked) if asked else []


def callbacks_of(asked: str) -> list[Any]:
    """Make callbacks of a text: names with ``;`` between, each with ``:option=value,option=value`` if need be.

    Values are YAML: numbers, ``true``, ``null``, words, ``[a, b]`` and ``{a: 1}``. A callback steps aside where the
    project has one of the same class, and keeps its state in checkpoints under a key of its own.

    Args:
        asked: Of ``monitor, activations, audit, probe, recalibrate, convert, freeze, fold``.

    Raises:
        BatchNormError: As `from_environment`.

    Example:
        >>> monitor, audit = callbacks_of("activations:every_n_steps=10,include=[layer1.*, fc];audit")
        >>> monitor.include, type(audit).__name__
        (('layer1.*', 'fc'), 'BatchNormAuditFromEnvironment')
    """
    made = [_made(part.strip()) for part in _split(asked, ";") if part.strip()]
    _calls["made"] += 1
    for callback in made:
        callback._call = _calls["made"]
    return made


def __getattr__(name: str) -> Any:
    """Find the class of a callback that was pickled, as strategies do that spawn processes."""
    kind = name.removesuffix(_SUFFIX)
    if name != kind and kind in _NAMES.values():
        return _stepping_aside(kind)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _made(part: str) -> Any:
    name, _, rest = part.partition(":")
    name = name.strip()
    if name not in _NAMES:
        raise BatchNormError(
            f"{VARIABLE} asks for {name!r}{nearest(name, _NAMES)}; expected one of {', '.join(_NAMES)}."
        )
    kind = _stepping_aside(_NAMES[name])
    signature = inspect.signature(kind)
    known = dict(signature.parameters)
    options = dict(_option(each, name, known) for each in _split(rest, ",") if each.strip())
    try:
        signature.bind(**options)  # its own words for an option that is missing are plainer than the constructor's
        return kind(**options)
    except Exception as error:  # of the callback itself, which says what it expected
        refused = str(error) if isinstance(error, BatchNormError) else first_line(error)
        raise BatchNormError(f"{VARIABLE} asks for {part!r}: {refused}") from error


def _option(text: str, name: str, known: dict[str, inspect.Parameter]) -> tuple[str, Any]:
    import yaml
    from jsonargparse import ArgumentError, ArgumentParser

    option, equals, value = text.partition("=")
    option = option.strip()
    if not equals or option not in known:
        meant = "" if option in known else nearest(option, known)
        raise BatchNormError(
            f"{VARIABLE} gives {name!r} the option {text.strip()!r}{meant}; expected option=value "
            f"with one of {', '.join(known)}."
        )
    try:
        given = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise BatchNormError(
            f"{VARIABLE} gives {name!r} {text.strip()!r}, whose value is no YAML ({first_line(error)}); a pattern that "
            "begins with a star is quoted, as in include=['*.bn1']."
        ) from error
    kind = known[option].annotation
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{option}", type=kind)
    try:
        return option, parser.parse_object({option: given})[option]
    except (ArgumentError, TypeError, ValueError) as error:
        said = kind.__name__ if isinstance(kind, type) else str(kind)
        cure = f": write [{given}]" if isinstance(given, str) and "list[" in said else ""
        raise BatchNormError(
            f"{VARIABLE} gives {name!r} {text.strip()!r}; expected {said}, got {given!r}{cure}."
        ) from error


def _split(text: str, separator: str) -> list[str]:
    """Split at separators that are outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        else:
            depth += (sign in _OPENING) - (sign in _CLOSING)
        if sign == separator and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += sign
    return parts


class _FromEnvironment:
    """What is mixed into a callback's class: a state key of its own, and stepping aside."""

    _kind: type
    _call: int

    @property
    def state_key(self) -> str:
        """Return the callback's own key, which its name tells from the project's.

        Lightning puts what comes from entry points into the very list it was given. If that list serves a second
        Trainer, it holds those of the first too, and equal keys are refused as it is made. So only those that were set
        up last have the plain key.
        """
        key = str(super().state_key)  # type: ignore[misc]
        return key if self._call == _calls["set up"] else f"{key} {self._call}"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Set the callback up, or take it out of the Trainer."""
        others = [each for each in trainer.callbacks if isinstance(each, self._kind)]
        own = [each for each in others if not isinstance(each, _FromEnvironment)]
        later = [each for each in others if isinstance(each, _FromEnvironment) and each._call > self._call]
        if own or later:
            # Another list, since Lightning is going through this one.
            trainer.callbacks = [each for each in trainer.callbacks if each is not self]
        else:
            _calls["set up"] = self._call
            super().setup(trainer, pl_module, stage)  # type: ignore[misc]
        if own:
            from lightning.pytorch.utilities import rank_zero_info

            rank_zero_info(f"{VARIABLE}: the project has a {self._kind.__name__} of its own, which is used instead.")


def _stepping_aside(kind: str) -> type:
    """Make the class of a callback from the environment, once."""
    here = sys.modules[__name__].__dict__
    name = f"{kind}{_SUFFIX}"
    if name not in here:
        from bn_lightning import callbacks

        base = getattr(callbacks, kind)
        own = {"__module__": __name__, "__qualname__": name, "__doc__": base.__doc__, "_kind": base}
        here[name] = type(name, (_FromEnvironment, base), own)
    return here[name]
