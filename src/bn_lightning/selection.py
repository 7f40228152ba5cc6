"""Pick layers by name pattern or type, and look through wrappers such as DDP and ``torch.compile``."""

import traceback
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel

from bn_lightning.errors import BatchNormError
from bn_lightning.internals import compiled_original

__all__ = [
    "as_patterns",
    "describe",
    "failing_layer",
    "is_selected",
    "named_batch_norms",
    "plain_name",
    "require_batch_norms",
    "select_modules",
    "unwrap",
]


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's own module inside ``torch.compile``, DDP or DataParallel wrappers.

    Raises:
        BatchNormError: If it is no module.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> unwrap(nn.DataParallel(net)) is net
        True
    """
    if not isinstance(model, nn.Module):
        raise BatchNormError(f"expected a torch.nn.Module as the model, got a {type(model).__name__}.")
    while True:
        inner = compiled_original(model)
        if inner is None and isinstance(model, DistributedDataParallel | DataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def select_modules(
    model: nn.Module,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    *,
    where: Callable[[nn.Module], bool] = lambda module: True,
) -> dict[str, nn.Module]:
    """Pick modules by ``fnmatch`` patterns on their qualified names, in registration order.

    Args:
        model: The network. A module that is registered twice appears once, under its first name.
        include: Patterns of which at least one has to match; empty means all.
        exclude: Patterns of which none may match.
        where: A further condition on the module itself.

    Returns:
        Qualified name to module. The root module's name is ``""``.

    Raises:
        BatchNormError: If a pattern matches none of the candidates, which is most often a typing error.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        >>> list(select_modules(net, include=("1",)))
        ['1']
    """
    include, exclude = as_patterns(include, "include"), as_patterns(exclude, "exclude")
    candidates = {name: module for name, module in model.named_modules() if where(module)}
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(_matches(name, pattern) for name in candidates):
                known = ", ".join(repr(name) for name in list(candidates)[:5]) or "none at all"
                raise BatchNormError(
                    f"{option} pattern {pattern!r} matches none of the {len(candidates)} candidate layers; "
                    f"their names begin with {known}. Patterns are fnmatch patterns on qualified names."
                )
    return {name: module for name, module in candidates.items() if is_selected(name, include, exclude)}


def plain_name(name: str) -> str:
    """Return a name as it was before ``torch.compile`` wrapped a module that it leads through.

    Example:
        >>> plain_name("backbone._orig_mod.0")
        'backbone.0'
    """
    return name.replace("_orig_mod.", "")


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(plain_name(name), pattern)


def is_selected(name: str, include: Iterable[str], exclude: Iterable[str]) -> bool:
    """Tell whether patterns pick a name: one of ``include``, or that is empty, and none of ``exclude``.

    Example:
        >>> is_selected("layer4.0.bn1", ("layer4.*",), ("*.bn2",))
        True
    """
    include = tuple(include)
    wanted = not include or any(_matches(name, pattern) for pattern in include)
    return wanted and not any(_matches(name, pattern) for pattern in exclude)


def named_batch_norms(
    model: nn.Module, include: Iterable[str] = (), exclude: Iterable[str] = ()
) -> dict[str, _BatchNorm]:
    """Pick the BatchNorm layers, SyncBatchNorm and subclasses among them.

    Raises:
        BatchNormError: If a pattern matches no BatchNorm layer.

    Example:
        >>> list(named_batch_norms(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))))
        ['1']
    """
    picked = select_modules(model, include, exclude, where=lambda module: isinstance(module, _BatchNorm))
    return {name: module for name, module in picked.items() if isinstance(module, _BatchNorm)}


def require_batch_norms(
    model: nn.Module,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    *,
    error: type[BatchNormError] = BatchNormError,
) -> dict[str, _BatchNorm]:
    """Pick the BatchNorm layers as `named_batch_norms` does, and refuse a network without any.

    Raises:
        BatchNormError: Of the given class, naming the model and what it holds instead.
    """
    if not named_batch_norms(model):
        raise error(
            f"{type(model).__name__} has no BatchNorm layer (no torch.nn.BatchNorm1d/2d/3d, SyncBatchNorm or "
            f"subclass among its {sum(1 for _ in model.modules())} modules). Pass the network that has them; "
            "functional F.batch_norm calls own no layer."
        )
    picked = named_batch_norms(model, include, exclude)
    if not picked:
        raise error(f"include= and exclude= leave no BatchNorm layer of {type(model).__name__} to work on.")
    return picked


def as_patterns(patterns: Iterable[str] | None, option: str) -> tuple[str, ...]:
    """Check a list of name patterns as a user gave it; ``None`` means none.

    Raises:
        BatchNormError: If it is a bare string, which Python would take for a list of letters.

    Example:
        >>> as_patterns(["layer4.*"], "include")
        ('layer4.*',)
    """
    if isinstance(patterns, str):
        raise BatchNormError(
            f"{option}= takes a list of patterns, got the bare string {patterns!r}: write [{patterns!r}]."
        )
    found = tuple(patterns) if isinstance(patterns, Iterable) else () if patterns is None else (patterns,)
    for pattern in found:
        if not isinstance(pattern, str):
            raise BatchNormError(f"{option}= takes a list of patterns, which are strings, got {pattern!r}.")
    return found


def failing_layer(model: nn.Module, exception: BaseException) -> str | None:
    """Name the innermost module of the model whose forward an exception came through; ``None`` if there is none."""
    names = {id(module): name for name, module in model.named_modules()}
    found = None
    for frame, _ in traceback.walk_tb(exception.__traceback__):
        found = names.get(id(frame.f_locals.get("self")), found)
    return found


def describe(layers: Mapping[str, nn.Module]) -> str:
    """Name a few layers for a message.

    Example:
        >>> describe({"": nn.Identity(), "head": nn.Identity()})
        '(root), head'
    """
    names = [name or "(root)" for name in layers]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
