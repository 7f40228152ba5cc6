"""Find the normalization layers, and tell of each how it was called and what it normalizes by."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from bn_lightning.errors import FoldError
from bn_lightning.folding.reasons import Kept
from bn_lightning.internals import hooks_on
from bn_lightning.layers.base import BatchNormVariant
from bn_lightning.layers.kinds import has_activation
from bn_lightning.selection import select_modules
from bn_lightning.tracing.channels import Bypass
from bn_lightning.tracing.layers import TENSOR_ROLES
from bn_lightning.tracing.record import ForwardRecord, ModuleCall, Operation

if TYPE_CHECKING:
    from bn_lightning.folding.scene import Scene

__all__ = ["Norm", "inspect_norm", "is_norm", "join", "named_norms"]

# What a frozen layer is written with. A clamp, say, would pass every test on numbers within its limits.
# fmt: off
_ARITHMETIC = frozenset(
    {
        "add", "add_", "radd", "iadd", "sub", "sub_", "rsub", "isub", "subtract", "mul", "mul_", "rmul", "imul",
        "multiply", "div", "div_", "truediv", "divide", "true_divide", "rsqrt", "sqrt", "square", "pow", "reciprocal",
        "neg", "negative", "addcmul", "addcdiv", "batch_norm", "instance_norm", "view", "view_as", "reshape",
        "unsqueeze", "getitem", "expand", "expand_as", "to", "float", "half", "bfloat16", "double", "type", "type_as",
        "contiguous", "detach", "clone",
    }
)
# fmt: on
_PLAIN_FORWARDS = (_BatchNorm.forward, SyncBatchNorm.forward)


@dataclass(frozen=True, slots=True)
class Norm:
    """A layer that, as it was called, gives each channel one scale and one shift.

    Attributes:
        name: Qualified name.
        roles: For ``weight, bias, running_mean, running_var`` the qualified name of the tensor; missing if there is
            none. Empty for a variant, which says itself what it normalizes by.
        eps: Added to the variance.
        calls: How the normalization proper was called.
        tail: Names of the children that run behind it on its output, such as timm's drop and activation.
    """

    name: str
    roles: Mapping[str, str]
    eps: float
    calls: tuple[Bypass, ...]
    tail: tuple[str, ...] = ()

    @property
    def operations(self) -> frozenset[int]:
        """Indices of the operations of all calls."""
        return frozenset().union(*(call.operations for call in self.calls))

    def operations_making(self, value: int) -> set[int]:
        """Return the operations of the calls that make a value."""
        return {index for call in self.calls if call.output == value for index in call.operations}

    def operations_reading(self, value: int) -> set[int]:
        """Return the operations of the calls that read a value."""
        return {index for call in self.calls if call.input == value for index in call.operations}


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module is a BatchNorm layer, of torch's family or by what it holds.

    Frozen BatchNorm of torchvision, detectron2 and transformers is no subclass of torch's: it is a module that holds
    ``running_mean`` and ``running_var``.

    Example:
        >>> is_norm(nn.BatchNorm2d(3)), is_norm(nn.LayerNorm(3))
        (True, False)
    """
    if isinstance(module, _BatchNorm):
        return True
    buffers = module._buffers if isinstance(module._buffers, dict) else {}  # a TorchScript module's is no dict
    mean, var = (buffers.get(role) for role in ("running_mean", "running_var"))
    return mean is not None and var is not None and mean.dim() == 1 and mean.shape == var.shape


def named_norms(model: nn.Module, include: Iterable[str] = (), exclude: Iterable[str] = ()) -> dict[str, nn.Module]:
    """Pick the BatchNorm layers as `is_norm` knows them.

    Raises:
        BatchNormError: If a pattern matches none.
    """
    return select_modules(model, include, exclude, where=is_norm)


def inspect_norm(scene: "Scene", name: str, module: nn.Module) -> Norm | Kept:
    """Tell how a layer was called and what it normalizes by, or why it has to stay as it is."""
    kept = _as_a_module(name, module)
    if kept:
        return kept
    for role in TENSOR_ROLES:
        kernels = scene.record.unseen_tensors.get(join(name, role))
        if kernels:
            return Kept("opaque", f"its {role} is read by {kernels[0]} in code that cannot be recorded")
    module_calls = [
        (index, call) for index, call in enumerate(scene.record.module_calls) if call.module == name and call.end >= 0
    ]
    bodies = [_body(scene.record, index, call) for index, call in module_calls]
    seen = {index for body in bodies if body is not None for index in body.call.operations}
    kept = _used_elsewhere(scene, name, seen, any(body is None for body in bodies))
    if kept:
        return kept
    if not bodies:
        return _unreached(name, module)
    known = [body for body in bodies if body is not None]
    if len(known) < len(bodies) or any(body.tail != known[0].tail for body in known):
        return _own_forward(module)
    for body in known:
        given, made = (scene.record.values[index].dtype for index in (body.call.input, body.call.output))
        if given != made:
            return Kept("dtype", f"it makes {made} of {given}".replace("torch.", ""))
    if all(body.batch_norm for body in known):
        return _plain(name, known)
    return _by_what_it_holds(scene, name, module, known)


def join(owner: str, key: str) -> str:
    """Return the qualified name of a tensor or child."""
    return f"{owner}.{key}" if owner else key


def _as_a_module(name: str, module: nn.Module) -> Kept | None:
    """What the layer itself tells, before any call."""
    fixed = isinstance(module, BatchNormVariant) and module.fixed_tensors() is not None
    if isinstance(module, _BatchNorm) and not fixed:
        if module.training:
            return Kept("training", f"call .eval() on {name!r}: in training mode it normalizes by the batch")
        if module.running_mean is None or module.running_var is None:
            return Kept(
                "no_stats",
                f"track_running_stats={module.track_running_stats}: it normalizes by the batch in evaluation",
            )
        if isinstance(module, BatchNormVariant):
            return Kept("no_stats", f"{type(module).__name__} takes the batch's statistics in evaluation")
    kinds = hooks_on(module)
    if kinds:
        return Kept("hook", f"{name!r} carries {kinds[0]}")
    if "forward" in vars(module):
        return Kept("hook", f"the forward of {name!r} was replaced on the instance")
    return None


@dataclass(frozen=True, slots=True)
class _Body:
    """What one call of a layer consists of: the normalization, then children one behind the other."""

    call: Bypass
    tail: tuple[str, ...]
    batch_norm: Operation | None


def _body(record: ForwardRecord, place: int, call: ModuleCall) -> _Body | None:
    """Take a call of a layer apart; ``None`` if it does anything else."""
    own = [each for each in record.operations[call.first : call.end] if each.module == call.module]
    children = [
        each
        for each in record.module_calls
        if each.parent == place and not each.module.startswith(join(call.module, "parametrizations"))
    ]
    single = own[0] if len(own) == 1 and own[0].kind == "batch_norm" else None
    made = {value for each in own for value in each.outputs}
    given = {value for each in own for value in each.inputs} - made
    if single is not None and single.layer is not None:
        given = set() if single.layer.input is None else {single.layer.input}  # not a weight that was computed
    if len(given) != 1 or len(call.outputs) != 1:
        return None
    output = children[0].inputs[0] if children and children[0].inputs else call.outputs[0]
    indices = frozenset(each.index for each in own)
    for index in made - {output}:
        value = record.values[index]
        if not set(value.readers) <= indices or value.escaped or value.output or value.unseen:
            return None
    last = output
    for child in children:
        if child.inputs != (last,) or child.arguments != 1 or len(child.outputs) != 1:
            return None
        last = child.outputs[0]
    if output not in made or last != call.outputs[0]:
        return None
    (source,) = given
    tail = tuple(child.module.rpartition(".")[2] for child in children)
    return _Body(Bypass(source, output, indices), tail, single)


def _used_elsewhere(scene: "Scene", name: str, seen: set[int], unclear: bool) -> Kept | None:
    """Who else uses the layer's tensors, and under which other names."""
    for role in TENSOR_ROLES:
        own = join(name, role)
        for reader in scene.record.tensor_readers(own):
            others = [each for each in (reader.layer.tensors.get(role) if reader.layer else None) or () if each != own]
            if others:
                return Kept("tied", f"its {role} is also {others[0]!r}")
            if reader.index in seen or (unclear and reader.module == name):
                continue
            mean = (reader.layer.tensors.get("running_mean") if reader.layer else None) or ()
            if reader.kind == "batch_norm" and join(name, "running_mean") in mean:
                where = repr(reader.module) if reader.module else "the root module"
                return Kept("functional", f"{where} calls batch_norm with its statistics")
            return Kept("tied", f"its {role} is also read by {reader}")
    return None


def _own_forward(module: nn.Module) -> Kept:
    return Kept("subclass", f"{type(module).__name__} has a forward of its own that is not known to be foldable")


def _unreached(name: str, module: nn.Module) -> Norm | Kept:
    """A layer that no example call reaches cannot be folded; what a known class would do is known all the same."""
    if isinstance(module, _BatchNorm) and (type(module).forward in _PLAIN_FORWARDS or has_activation(module)):
        return Norm(name, _held(name, module), module.eps, (), tuple(module._modules))
    return Kept("not_reached", "no example call reaches it")


def _plain(name: str, bodies: list[_Body]) -> Norm | Kept:
    """One call of torch's own batch norm, with the layer's own tensors."""
    roles: dict[str, str] = {}
    eps = 0.0
    for body in bodies:
        assert body.batch_norm is not None
        assert body.batch_norm.layer is not None
        use, eps = body.batch_norm.layer, body.batch_norm.layer.eps
        for role in TENSOR_ROLES:
            names = use.tensors.get(role)
            if names == ():
                return Kept("parametrized", f"its {role} is computed anew at every call, not a parameter of the model")
            if names and names != (join(name, role),):
                other = next(other for other in names if other != join(name, role))
                return Kept("tied", f"its {role} is also {other!r}")
            if names:
                roles[role] = names[0]
        if use.training:
            return Kept("training", "it was called to normalize by the batch")
    if not {"running_mean", "running_var"} <= roles.keys():
        return Kept("no_stats", "it normalizes by the batch in evaluation")
    return Norm(name, roles, eps, tuple(body.call for body in bodies), bodies[0].tail)


def _by_what_it_holds(scene: "Scene", name: str, module: nn.Module, bodies: list[_Body]) -> Norm | Kept:
    """A layer that computes by itself: a variant says what it does, a frozen one is put to the test."""
    for tensor in _foreign_tensors(scene, name, {index for body in bodies for index in body.call.operations}):
        return Kept("subclass", f"{type(module).__name__} also uses {tensor!r}")
    calls, tail = tuple(body.call for body in bodies), bodies[0].tail
    if isinstance(module, BatchNormVariant):
        if not type(module).__module__.startswith("bn_lightning.layers."):
            return _own_forward(module)  # somebody's subclass
        return Norm(name, {}, module.eps, calls, tail)
    norm = Norm(name, _held(name, module), float(getattr(module, "eps", 1e-5)), calls, tail)
    functions = {scene.record.operations[index].function for call in calls for index in call.operations}
    if functions - _ARITHMETIC:
        return Kept(
            "subclass", f"{type(module).__name__} calls {min(functions - _ARITHMETIC)}, which is no scale and shift"
        )
    if tail or not scene.behaves_like(norm, module):
        return _own_forward(module)
    return norm


def _foreign_tensors(scene: "Scene", name: str, operations: set[int]) -> Iterator[str]:
    for tensor, readers in scene.record.tensor_reads.items():
        if tensor.rpartition(".")[0] != name and operations.intersection(readers):
            yield tensor


def _held(name: str, module: nn.Module) -> dict[str, str]:
    held = {role: getattr(module, role, None) for role in TENSOR_ROLES}
    return {role: join(name, role) for role, tensor in held.items() if isinstance(tensor, Tensor)}


def require_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Pick all BatchNorm layers, and refuse a network without any.

    Raises:
        FoldError: If so, naming what the model holds instead.
    """
    norms = named_norms(model)
    if norms:
        return norms
    if any(isinstance(module, nn.Identity) for module in model.modules()):
        raise FoldError(
            f"{type(model).__name__} has no BatchNorm layer, but holds torch.nn.Identity (already folded?). "
            "Pass a network that has BatchNorm layers; result.undo() of the first fold brings them back."
        )
    raise FoldError(
        f"{type(model).__name__} has no BatchNorm layer (no torch.nn.BatchNorm1d/2d/3d, SyncBatchNorm, frozen one or "
        f"subclass among its {sum(1 for _ in model.modules())} modules). Pass the network that has them; "
        "functional F.batch_norm calls own no layer."
    )
