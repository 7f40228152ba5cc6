"""Networks of Hugging Face's transformers, by what names them there."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from bn_lightning.errors import BatchNormError, first_line, nearest
from bn_lightning.zoo.package import built, zoo_package

__all__ = ["build_transformers", "vision_types"]

# In this order: a type that has both is a classifier.
_TASKS = ("IMAGE_CLASSIFICATION", "SEMANTIC_SEGMENTATION")
_HAVE_CLASSES = ("Classification", "Segmentation", "Detection")


def build_transformers(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    """Build what ``hf:…`` names.

    - ``hf:resnet``, ``hf:ResNetConfig``: a model type or its configuration's class, in its default configuration; an
      image classifier, or else a network for semantic segmentation.
    - ``hf:ResNetForImageClassification``: a class of transformers, in the default configuration.
    - ``hf:path/to/folder``: by the ``config.json`` there, and with ``pretrained`` the weights there.
    - ``hf:microsoft/resnet-50``: the same of Hugging Face's hub, or of its cache on this machine.

    No code that stands beside the weights is run.

    Raises:
        BatchNormError: If it cannot be built, or not all of its weights are there.
    """
    library, within = zoo_package("transformers", name), name.partition(":")[2]
    labels = {"num_labels": options["num_classes"]} if "num_classes" in options else {}
    named = _default(library, within, labels)
    if named is not None:
        kind, config = named
        if pretrained:
            raise BatchNormError(
                f"{name!r} names an architecture, which has no weights of its own; pretrained=True is for a folder or "
                "a name on Hugging Face's hub, such as 'hf:microsoft/resnet-50'."
            )
    else:
        place = _place(library, name, within)
        config = _configuration(library, name, place, labels)
        kind = _class_of(library, name, config, bool(labels))
    if labels and not _has_classes(kind):
        raise BatchNormError(f"{name!r} is a {kind.__name__}, which has no classes; leave out num_classes.")
    if pretrained:
        return _with_weights(name, kind, place, config, bool(labels))
    return built(name, kind, config)


def vision_types(library: Any) -> dict[str, str]:
    """Return the model types that ``hf:TYPE`` builds, each with the name of its class."""
    auto = library.models.auto.modeling_auto
    found: dict[str, str] = {}
    for task in _TASKS:
        for kind, names in getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES").items():
            # Of several classes, such as DeiT's with its teacher, the first is the plain one.
            found.setdefault(kind, names if isinstance(names, str) else names[0])
    return found


def _default(library: Any, within: str, labels: dict[str, int]) -> tuple[Any, Any] | None:
    """Find the class and the default configuration of a type or class, if that is what is named."""
    kinds = vision_types(library)
    if within in kinds:
        kind = getattr(library, kinds[within])
        return kind, built(f"hf:{within}", kind.config_class, **labels)
    known: Any = getattr(library, within, None) if within.isidentifier() else None
    if not isinstance(known, type):
        return None
    of_type = getattr(known, "model_type", None)
    if of_type in kinds:  # a configuration's class
        return getattr(library, kinds[of_type]), built(f"hf:{within}", known, **labels)
    configuration = getattr(known, "config_class", None)
    if issubclass(known, nn.Module) and configuration is not None:
        return known, built(f"hf:{within}", configuration, **labels)
    return None


def _place(library: Any, name: str, within: str) -> str:
    """Return the folder, or the name on the hub."""
    folder = Path(within).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise BatchNormError(
                f"{name!r} is a folder without a config.json; expected what transformers' save_pretrained writes."
            )
        return str(folder)
    if within.count("/") != 1 or within[0] in "/.~":
        if "/" in within:
            raise BatchNormError(f"{name!r}: there is no folder {within!r}.")
        kinds = vision_types(library)
        raise BatchNormError(
            f"transformers {library.__version__} has no {within!r}{nearest(within, kinds)}; expected a model type for "
            "images, such as 'hf:resnet', a class of transformers, a folder with a config.json, or a name on Hugging "
            "Face's hub, such as 'hf:microsoft/resnet-50'."
        )
    return within


def _configuration(library: Any, name: str, place: str, labels: dict[str, int]) -> Any:
    try:
        # Not None: that would ask at the terminal whether to run code from there.
        return library.AutoConfig.from_pretrained(place, trust_remote_code=False, **labels)
    except Exception as error:
        raise BatchNormError(f"{name!r} could not be read ({first_line(error)}). {_where_from(place)}") from error


def _where_from(place: str) -> str:
    if Path(place).is_dir():
        return "Expected the config.json that transformers' save_pretrained writes."
    return (
        "A name with a slash is looked up on Hugging Face's hub, which needs a network, or the files in its cache on "
        "this machine; a folder on this machine needs neither."
    )


def _class_of(library: Any, name: str, config: Any, with_classes: bool) -> Any:
    """Return the class that the configuration names, or its type's where it names none or one that does not do."""
    for written in getattr(config, "architectures", None) or ():
        kind = getattr(library, written, None)
        if kind is not None and (_has_classes(kind) or not with_classes):
            return kind
    kinds = vision_types(library)
    if config.model_type not in kinds:
        raise BatchNormError(
            f"{name!r} is of the type {config.model_type!r}, which transformers {library.__version__} has no network "
            "for images with classes for."
        )
    return getattr(library, kinds[config.model_type])


def _has_classes(kind: Any) -> bool:
    return any(task in kind.__name__ for task in _HAVE_CLASSES)


def _with_weights(name: str, kind: Any, place: str, config: Any, other_head: bool) -> nn.Module:
    """Load the weights by transformers' own means; what it would only log is refused."""
    model, info = built(
        name,
        kind.from_pretrained,
        place,
        config=config,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        trust_remote_code=False,
    )
    base = f"{model.base_model_prefix}."
    missing = [key for key in info["missing_keys"] if not key.endswith("num_batches_tracked")]
    resized = [str(each[0]) for each in info["mismatched_keys"]]
    if other_head:  # is drawn anew, as timm does
        missing, resized = ([key for key in keys if key.startswith(base)] for keys in (missing, resized))
    problems = [
        *_told("its files lack", missing),
        *_told("the network lacks", info["unexpected_keys"]),
        *_told("other shapes have", resized),
        *map(str, info["error_msgs"]),
    ]
    if problems:
        raise BatchNormError(f"the weights of {name!r} do not fit {kind.__name__}: {'; '.join(problems)}.")
    return model.train()


def _told(problem: str, keys: Iterable[str]) -> list[str]:
    keys = sorted(keys)
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return [f"{problem} {', '.join(map(repr, keys[:3]))}{more}"] if keys else []
