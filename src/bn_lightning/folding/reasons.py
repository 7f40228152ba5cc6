"""Why a layer stays: codes that scripts may rely on."""

from dataclasses import dataclass

__all__ = ["REASONS", "Kept"]

REASONS = {
    "training": "the layer is in training mode",
    "no_stats": "it has no running statistics, or does not go by them",
    "not_reached": "no example call reaches it",
    "reused": "the layer or a partner is used in more than one way",
    "tied": "a tensor of the layer or a partner is shared with something else",
    "multi_user": "a value that folding would change is also read by something else",
    "escaped": "a value that folding would change outlives the forward pass",
    "opaque": "code that cannot be recorded reads a value or a tensor that folding would change",
    "output": "the model returns a value that folding would change",
    "hook": "a hook sees values that folding would change",
    "parametrized": "a weight is computed, not a parameter of the model",
    "subclass": "a class whose own forward is not known to be foldable",
    "functional": "the tensors are used by a call outside their own layer",
    "overwritten": "something writes in place to memory that the layer's input and output would share",
    "layout": "what reads its output needs another memory layout than its input has",
    "dtype": "it changes the dtype of what it normalizes",
    "axis_mismatch": "its channels are not those of the partner, or several are mixed on the way",
    "nonlinear_between": "what feeds it is no convolution or linear layer, nor what reads it",
    "zero_padding": "what reads it pads with zeros, which its shift would have to reach",
    "negative_scale": "a maximum is taken on the way, which commutes with positive scales only",
    "excluded": "left out by include= or exclude=",
    "nonfinite": "its statistics or weights are not finite",
    "exploding": "a scale is so large that it would drown the rest",
    "overflow": "the folded weights leave the range of their dtype",
    "unverified": "with it folded the outputs differed",
}


@dataclass(frozen=True, slots=True)
class Kept:
    """Why a layer stays.

    Attributes:
        reason: A code of `REASONS`.
        detail: The same with names and numbers.
    """

    reason: str
    detail: str
