"""One family of errors: what went wrong, where, and what to do about it."""

__all__ = ["AuditError", "BatchNormError", "ConversionError", "FoldError", "RecalibrationError"]


class BatchNormError(ValueError):
    """Base of every error this library raises on purpose."""


class ConversionError(BatchNormError):
    """A BatchNorm layer cannot be replaced as asked."""


class FoldError(BatchNormError):
    """A network cannot be folded as asked."""


class AuditError(BatchNormError):
    """A network cannot be audited with what was given."""


class RecalibrationError(BatchNormError):
    """Population statistics cannot be measured with what was given."""
