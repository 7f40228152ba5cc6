"""Start-up file of a virtual environment that holds a CPU torch beside a CUDA build of torchvision.

torchvision's operators are then not loadable, and ``import torchvision`` stops at "operator torchvision::nms does
not exist", taking torchmetrics, lightning and timm with it. The import hook below fires at the import of torchvision
and of nothing else: it tries to load the operators and, where that fails, declares the two schemas that the import
asks for. It imports nothing before that, since this file runs at the start of every interpreter.
"""

import sys


class _BeforeTorchvision:
    """A finder that finds nothing; it acts when torchvision is asked for, once."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            _declare_missing_operators()


def _declare_missing_operators():
    import contextlib
    import glob
    import importlib.machinery
    import os

    spec = importlib.machinery.PathFinder.find_spec("torchvision")
    if spec is None:
        return
    try:
        import torch
    except ImportError:
        return  # torchvision's own import says so better
    for folder in spec.submodule_search_locations or ():
        for library in glob.glob(os.path.join(folder, "_C*")):
            with contextlib.suppress(OSError):
                torch.ops.load_library(library)
    declared = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in (
        ("nms", "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
        ("qnms", "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
    ):
        if not hasattr(torch.ops.torchvision, name):
            declared.define(schema)
    _KEEP_ALIVE.append(declared)


_KEEP_ALIVE = []
sys.meta_path.insert(0, _BeforeTorchvision())
