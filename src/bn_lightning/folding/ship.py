"""Write a network into one file that runs elsewhere."""

import io
import os
import pickletools
import sys
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bn_lightning.errors import BatchNormError, first_line
from bn_lightning.tracing.calls import ExampleCall, example_calls
from bn_lightning.tracing.nested import iter_tensors, map_tensors

__all__ = ["ShippedFile", "require_format", "ship_network"]


@dataclass(frozen=True, slots=True)
class ShippedFile:
    """A network in a file.

    Attributes:
        path: Of the file.
        format: What it holds.
        size: In bytes.
        load: The expression that gives the network back.
        needs: The packages that have to be there for it, beside Python's own.
    """

    path: str
    format: str
    size: int
    load: str
    needs: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that go into JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.format}, {self.size / 1e6:.3g} MB; load it by {self.load} "
            f"(needs {', '.join(self.needs)})"
        )


def ship_network(model: nn.Module, example_inputs: Any, path: str | Path) -> ShippedFile:
    """Write a network into one file, in the format that the file's ending says.

    - ``.pt`` and ``.pth``: the whole network by ``torch.save``; loading it imports the packages its classes are from.
    - ``.pt2``: a program of ``torch.export``, for any batch size; loading it needs torch alone.
    - ``.onnx``: the same for ONNX runtimes.

    The file is complete or not there: it is written beside its place and then moved, and replaces what was there.
    Missing parent folders are made.

    Args:
        model: The network, in evaluation mode.
        example_inputs: As for `fold_batch_norm`; the first call is what is exported. Its first tensor's axis 0, and
            that of every tensor as long, is the batch, which may have any size from then on.
        path: Of the file.

    Raises:
        BatchNormError: If the ending is another, the network cannot be written so, or the file cannot.

    Example:
        >>> import tempfile
        >>> net = nn.Sequential(nn.Linear(3, 2), nn.ReLU()).eval()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     shipped = ship_network(net, torch.zeros(2, 3), f"{folder}/net.pt2")
        ...     torch.export.load(shipped.path).module()(torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """
    path = Path(path)
    require_format(path)
    written = _FORMATS[path.suffix.lower()]
    if model.training:
        raise BatchNormError(f"{type(model).__name__} is in training mode, which would be shipped: call model.eval().")
    call = example_calls(example_inputs, error=BatchNormError)[0]
    try:
        with warnings.catch_warnings():
            # torch.export's own code, torch 2.13
            warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated", category=FutureWarning)
            content = written.encode(model, call)
    except Exception as error:
        raise BatchNormError(
            f"{type(model).__name__} cannot be written as {written.name} ({first_line(error).rstrip('.')}); "
            f"{written.instead}."
        ) from error
    try:
        _replace(path, content)
    except OSError as error:
        raise BatchNormError(
            f"{str(path)!r} cannot be written ({first_line(error)}); nothing was left there."
        ) from error
    needs = written.needs or _imported_by(content)
    return ShippedFile(str(path), written.name, len(content), written.load.format(repr(str(path))), needs)


def require_format(path: str | Path) -> None:
    """Check that a file's ending names a format, and that the packages it takes to write are there.

    Raises:
        BatchNormError: If not; the message has the endings there are.

    Example:
        >>> require_format("net.pt2")
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _FORMATS:
        endings = ", ".join(f"{ending} ({known.name})" for ending, known in _FORMATS.items())
        raise BatchNormError(f"the ending of {str(path)!r} names no format; expected one of {endings}.")
    missing = [package for package in _FORMATS[suffix].written_with if find_spec(package) is None]
    if missing:
        raise BatchNormError(f"{suffix} is written with {' and '.join(missing)}: pip install 'bn-lightning[export]'")


def _pickled(model: nn.Module, call: ExampleCall) -> bytes:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return buffer.getvalue()


def _exported(model: nn.Module, call: ExampleCall) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(_program(model, call)[0], buffer)
    return buffer.getvalue()


def _onnx(model: nn.Module, call: ExampleCall) -> bytes:
    program, shapes = _program(model, call)
    # The shapes again, for the name of the axis alone.
    onnx = torch.onnx.export(program, dynamo=True, verbose=False, dynamic_shapes=shapes)
    assert onnx is not None
    # Not onnx.save: from 2 GB on it would put the weights into a second file. This raises.
    return onnx.model_proto.SerializeToString()


def _program(model: nn.Module, call: ExampleCall) -> tuple[torch.export.ExportedProgram, dict[str, Any]]:
    """Export with a dynamic batch; also return the shapes that were asked for, by the names of forward's arguments."""
    call = _of_two(call.copied())
    kwargs = dict(call.kwargs or {})
    batch, shapes = torch.export.Dim("batch"), torch.export.ShapesCollection()
    for tensor in _batches(call):
        shapes[tensor] = {0: batch}
    dynamic = shapes.dynamic_shapes(model, call.args, kwargs)
    return torch.export.export(model, call.args, kwargs, dynamic_shapes=dynamic), dynamic


def _of_two(call: ExampleCall) -> ExampleCall:
    """Double a batch of one: torch.export would take its size for a constant."""
    ones = {id(tensor) for tensor in _batches(call) if len(tensor) == 1}

    def double(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor]) if id(tensor) in ones else tensor

    return ExampleCall(map_tensors(call.args, double), map_tensors(dict(call.kwargs or {}), double))


def _batches(call: ExampleCall) -> list[Tensor]:
    tensors = [tensor for tensor in iter_tensors((call.args, call.kwargs)) if tensor.dim()]
    return [tensor for tensor in tensors if len(tensor) == len(tensors[0])]


def _imported_by(content: bytes) -> tuple[str, ...]:
    """Name the packages that loading a network saved whole imports, torch first; Python's own left out."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        codes = [(code.name, str(argument)) for code, argument, _ in pickletools.genops(archive.read(pickled))]
    packages = {argument.split()[0].partition(".")[0] for name, argument in codes if name == "GLOBAL"}
    pythons = {"torch", *sys.stdlib_module_names, "__builtin__", "copy_reg"}  # the last two in pickle's own spelling
    return ("torch", *sorted(packages - pythons))


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or a crash of the machine could leave the new name on an empty file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class _Format:
    """How a network is written, and read again; ``needs`` is empty where it depends on the network."""

    name: str
    encode: Callable[[nn.Module, ExampleCall], bytes]
    load: str
    needs: tuple[str, ...]
    written_with: tuple[str, ...]
    instead: str


_PICKLE = _Format(
    "the whole network by torch.save",
    _pickled,
    "torch.load({}, weights_only=False)",
    (),
    (),
    "an ending of .pt2 or .onnx writes what it computes, without its classes",
)
_EXPORT = _Format(
    "torch.export program, any batch size",
    _exported,
    "torch.export.load({}).module()",
    ("torch",),
    (),
    "an ending of .pt writes the network as it is",
)
_ONNX = _Format(
    "ONNX, any batch size",
    _onnx,
    "onnxruntime.InferenceSession({})",
    ("onnxruntime",),
    ("onnx", "onnxscript"),
    "an ending of .pt2 or .pt asks for less",
)
_FORMATS = {".pt": _PICKLE, ".pth": _PICKLE, ".pt2": _EXPORT, ".onnx": _ONNX}
