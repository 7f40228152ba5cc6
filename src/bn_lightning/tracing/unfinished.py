"""What a recorder knows of a value or a module call while the forward pass still runs."""

from dataclasses import dataclass, field

import torch

__all__ = ["OpenCall", "OpenValue"]


@dataclass(slots=True)
class OpenValue:
    """A value whose readers are still being collected."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    producer: int | None
    readers: list[int] = field(default_factory=list)
    output: bool = False
    escaped: bool = False
    unseen: list[str] = field(default_factory=list)
    memory: int = -1
    strides: tuple[int, ...] = ()


@dataclass(slots=True)
class OpenCall:
    """A module call that has not returned yet."""

    module: str
    call: int
    first: int
    inputs: tuple[int, ...]
    parent: int | None
    end: int = -1
    outputs: tuple[int, ...] = ()
    arguments: int = 0
