"""What a person is told."""

from dataclasses import dataclass

__all__ = ["Alert"]


@dataclass(frozen=True, slots=True)
class Alert:
    """One thing that began to go wrong.

    Attributes:
        rule: The rule's name.
        layer: The first or the worst of the layers in which it began.
        step: The optimizer step of the sample that showed it; ``None`` where there is no such thing.
        message: The layer, what was found, what was expected, and what to do.
    """

    rule: str
    layer: str
    step: int | None
    message: str

    def __str__(self) -> str:
        return self.message
