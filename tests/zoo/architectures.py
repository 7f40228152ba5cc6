"""Which architectures there are to fold, and how to build each with its first weights."""

import json
import multiprocessing
import warnings
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from itertools import chain, zip_longest
from pathlib import Path

import timm
import torch
import torchvision
from torch import nn
from torchvision import models
from zoo.detectors import BareDetector

from bn_lightning.folding.norms import named_norms

__all__ = ["VERSIONS", "Architecture", "build", "matching", "seed_of", "survey"]

VERSIONS = {"torch": torch.__version__, "timm": timm.__version__, "torchvision": torchvision.__version__}
# What the published measurements of other folders take; torchvision's few larger ones are taken all the same.
_MOST_PARAMETERS = 60_000_000
_TORCHVISION = {"classification": models, "segmentation": models.segmentation, "detection": models.detection}


@dataclass(frozen=True, slots=True)
class Architecture:
    """One network of the zoo.

    Attributes:
        name: ``timm:…`` or ``torchvision:…``.
        source: ``timm``, or torchvision and the task.
        family: The module of timm or torchvision that it comes from.
        parameters: Their number.
        norms: Number of BatchNorm layers.
        input_size: Channels, height and width that its makers trained it with; ``None`` if they do not say.
        fixed: Whether it takes no other size.
    """

    name: str
    source: str
    family: str
    parameters: int
    norms: int
    input_size: tuple[int, int, int] | None = None
    fixed: bool = False


def matching(patterns: Iterable[str]) -> list[tuple[str, str, str]]:
    """Name, source and family of every model whose name matches one of the patterns, BatchNorm or not."""
    found = [
        (f"timm:{name}", "timm", module) for module in timm.list_modules() for name in timm.list_models("", module)
    ]
    for task, module in _TORCHVISION.items():
        for name in models.list_models(module=module):
            family = models.get_model_builder(name).__module__.rpartition(".")[2]
            found.append((f"torchvision:{name}", f"torchvision {task}", family))
    return [each for each in found if any(fnmatch(name, p) for name in _names(each[0]) for p in patterns)]


def survey(
    chosen: Iterable[tuple[str, str, str]], cache: Path, *, workers: int, say: Callable[[str], None]
) -> list[Architecture]:
    """Pick those that have BatchNorm and the right size, one of each family before the second of any.

    Every model is built once without data to see what it holds (two minutes for all); ``cache`` keeps that.
    """
    chosen = list(chosen)
    kept = json.loads(cache.read_text()) if cache.exists() else {}
    known = kept["architectures"] if kept.get("versions") == VERSIONS else {}
    missing = [each for each in chosen if each[0] not in known]
    if missing:
        say(f"looking at {len(missing)} models (built without data) …")
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            for each in pool.imap_unordered(_look_at, missing):
                known[each.name] = asdict(each)
        cache.write_text(json.dumps({"versions": VERSIONS, "architectures": known}))
    families: dict[tuple[str, str], list[Architecture]] = {}
    for name, source, family in chosen:
        each = Architecture(**known[name])
        if each.norms and (source != "timm" or each.parameters < _MOST_PARAMETERS):
            families.setdefault((source, family), []).append(each)
    columns = [sorted(family, key=lambda each: (each.parameters, each.name)) for family in families.values()]
    return [each for each in chain(*zip_longest(*columns)) if each is not None]


def build(name: str) -> nn.Module:
    """Build the model in evaluation mode, its weights drawn from a seed of its own."""
    library, _, bare = name.partition(":")
    torch.manual_seed(seed_of(name))
    if library == "timm":
        return timm.create_model(bare, pretrained=False).eval()
    if models.get_model_builder(bare).__module__.count(".") == 2:  # torchvision.models.resnet, a classifier
        return models.get_model(bare, weights=None).eval()
    model = models.get_model(bare, weights=None, weights_backbone=None).eval()
    return BareDetector(model) if ".detection." in type(model).__module__ else model


def seed_of(name: str) -> int:
    """Give the name's own seed, the same in every process."""
    return zlib.crc32(name.encode())


def _look_at(chosen: tuple[str, str, str]) -> Architecture:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    name, source, family = chosen
    try:
        try:
            with torch.device("meta"):
                model = build(name)
        except NotImplementedError:  # torchvision's RegNet computes its widths with tensors
            model = build(name)
    except Exception:  # is taken, so that measuring it tells what is wrong
        return Architecture(name, source, family, parameters=0, norms=1)
    config = getattr(model, "default_cfg", None) or {}
    size = config.get("input_size")
    return Architecture(
        name,
        source,
        family,
        sum(parameter.numel() for parameter in model.parameters()),
        len(named_norms(model)),
        tuple(size) if size else None,
        bool(config.get("fixed_input_size")),
    )


def _names(name: str) -> tuple[str, str]:
    return name, name.partition(":")[2]
