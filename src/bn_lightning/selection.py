"""Pick layers by name pattern or type, and look through wrappers such as DDP and ``torch.compile``."""

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel

from bn_lightning.errors import BatchNormError
from bn_lightning.internals import compiled_original

__all__ = ["named_batch_norms", "require_batch_norms", "select_modules", "unwrap"]


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's own module inside ``torch.compile``, DDP or DataParallel wrappers.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> unwrap(nn.DataParallel(net)) is net
        True
    """
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
    include, exclude = _patterns(include, "include"), _patterns(exclude, "exclude")
    candidates = {name: module for name, module in model.named_modules() if where(module)}
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in candidates):
                known = ", ".join(repr(name) for name in list(candidates)[:5]) or "none at all"
                raise BatchNormError(
                    f"{option} pattern {pattern!r} matches none of the {len(candidates)} candidate layers; "
                    f"their names begin with {known}. Patterns are fnmatch patterns on qualified names."
                )
    return {
        name: module
        for name, module in candidates.items()
        if (not include or any(fnmatchcase(name, pattern) for pattern in include))
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
    }


def named_batch_norms(
    model: nn.Module, include: Iterable[str] = (), exclude: Iterable[str] = ()
) -> dict[str, _BatchNorm]:
    """Pick the BatchNorm layers, SyncBatchNorm and subclasses among them.

    Raises:
        BatchNormError: If a pattern matches no BatchNorm layer.

    Example:
        >>> named_batch_norms(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
        {'1': BatchNorm1d(2, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)}
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


def _patterns(patterns: Iterable[str], option: str) -> tuple[str, ...]:
    if isinstance(patterns, str):
        raise BatchNormError(
            f"{option}= takes a list of patterns, got the bare string {patterns!r}: write ({patterns!r},)."
        )
    return tuple(patterns)


def describe(layers: Mapping[str, nn.Module]) -> str:
    """Name a few layers for a message."""
    names = [name or "(root)" for name in layers]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
