"""Domain-specific Batch Normalization: statistics, and scale and shift on demand, for each domain."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.errors import BatchNormError, ConversionError
from bn_lightning.functional.training_step import batch_norm_step
from bn_lightning.layers.base import BatchNormVariant
from bn_lightning.layers.swap import forget_variant

__all__ = ["DomainBatchNorm", "DomainTensors"]


class DomainTensors(NamedTuple):
    """What one domain normalizes by, under torch's names: the layer's own tensors, or views of their rows."""

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class DomainBatchNorm(BatchNormVariant):
    """Plain BatchNorm in each of several domains, of which `use_domain` says the one at hand.

    torch's own tensors are domain 0's, which is the one at hand until another is said. The others' statistics are the
    buffers ``other_running_mean`` and ``other_running_var``, (num_domains − 1, C), and ``other_num_batches_tracked``;
    with ``per_domain_affine`` domain d has the parameters ``other_weight_d`` and ``other_bias_d``, (C,). All are in the
    state_dict. A plain checkpoint loads too, strictly, and starts every domain; so does a plain layer on conversion.
    `select` leads back to a plain layer.

    AdvProp's auxiliary BN is two domains, with the adversarial batches in domain 1. With ``per_domain_affine`` a step
    that visits some domains only leaves the others' parameters without gradient, for which DDP wants
    ``find_unused_parameters=True``.

    Args:
        num_domains: At least 2.
        per_domain_affine: Whether each domain has a scale and a shift of its own.
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: See `BatchNormVariant`.

    Shape:
        (N, C, *), a batch of one domain.

    Example:
        >>> from bn_lightning import use_domain
        >>> layer = DomainBatchNorm(2, num_domains=3)
        >>> with use_domain(layer, 2):
        ...     _ = layer(torch.ones(4, 2))
        >>> layer.running_mean, layer.other_running_mean
        (tensor([0., 0.]),
         tensor([[0.0000, 0.0000],
                 [0.1000, 0.1000]]))

    Reference:
        Chang et al., arXiv:1906.03950 (statistics and affine per domain); Xie et al., arXiv:1911.09665 (AdvProp).
    """

    num_domains: int
    per_domain_affine: bool
    #: The domain at hand.
    domain: int = 0
    other_running_mean: Tensor | None
    other_running_var: Tensor | None
    other_num_batches_tracked: Tensor | None

    def configure(self, num_domains: int = 2, per_domain_affine: bool = False) -> None:
        """Give each further domain a copy of domain 0's tensors; domains that are there already keep theirs.

        Raises:
            ConversionError: If there are fewer than two domains.
        """
        if not isinstance(num_domains, int) or num_domains < 2:
            raise ConversionError(
                f"num_domains counts the domains, the first included: at least 2, got {num_domains!r}. One domain is "
                "plain BatchNorm."
            )
        self.num_domains, self.per_domain_affine = num_domains, per_domain_affine
        self.domain = self.domain if self.domain < num_domains else 0
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self._give_rows(f"other_{name}", getattr(self, name))
        wanted = {
            f"other_{name}_{domain}": getattr(self, name)
            for domain in range(1, num_domains if per_domain_affine else 1)
            for name in ("weight", "bias")
            if getattr(self, name) is not None
        }
        for key in _others(self._parameters).keys() - wanted.keys():
            delattr(self, key)
        for key, own in wanted.items():
            if key not in self._parameters:  # a parameter of its own, which no optimizer moves without a gradient
                self.register_parameter(key, nn.Parameter(own.detach().clone(), requires_grad=own.requires_grad))

    def _give_rows(self, key: str, own: Tensor | None) -> None:
        """Register a buffer of the other domains, of their present rows and copies of domain 0's."""
        present, rows = self._buffers.get(key), self.num_domains - 1
        if own is None:
            self.register_buffer(key, None)
        elif present is None or len(present) != rows:
            others = own.detach().repeat(rows, *[1] * own.dim())
            if present is not None:
                kept = min(rows, len(present))
                others[:kept] = present[:kept]
            self.register_buffer(key, others)

    def tensors(self, domain: int) -> DomainTensors:
        """Return a domain's statistics, scale and shift.

        Raises:
            BatchNormError: If there is no such domain.
        """
        self.check_domain(domain)
        if domain == 0:
            return DomainTensors(self.running_mean, self.running_var, self.num_batches_tracked, self.weight, self.bias)
        statistics = (self.other_running_mean, self.other_running_var, self.other_num_batches_tracked)
        mean, var, count = (None if rows is None else rows[domain - 1] for rows in statistics)
        if not self.per_domain_affine:
            return DomainTensors(mean, var, count, self.weight, self.bias)
        weight, bias = (getattr(self, f"other_{name}_{domain}", None) for name in ("weight", "bias"))
        return DomainTensors(mean, var, count, weight, bias)

    def fixed_tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None:
        """Return what the domain at hand normalizes by."""
        mean, var, _, weight, bias = self.tensors(self.domain)
        return None if self.training or mean is None or var is None else (mean, var, weight, bias)

    def adopt_statistics(self) -> str | None:
        """Say that there are parameters which an optimizer made before does not have."""
        new = len(_others(self._parameters))
        return f"{new} new parameters: make the optimizer afterwards, or add them to it" if new else None

    def unlike_population(self) -> str | None:
        """Say which domain is in use, where it is not the one that everybody sees."""
        return f"domain {self.domain} is in use, and running_mean is domain 0's" if self.domain else None

    def check_domain(self, domain: int) -> None:
        """Refuse a domain that there is not.

        Raises:
            BatchNormError: If so.
        """
        if not isinstance(domain, int) or not 0 <= domain < self.num_domains:
            raise BatchNormError(
                f"there is no domain {domain!r} in DomainBatchNorm({self.num_features}): with num_domains="
                f"{self.num_domains} they are 0 to {self.num_domains - 1}. Convert with a larger num_domains for more."
            )

    def normalize_batch(self, x: Tensor) -> Tensor:
        """Normalize as plain BN does, and move the statistics of the domain at hand."""
        return self.plain_step(x)

    def plain_step(self, x: Tensor) -> Tensor:
        """Take a step in the domain at hand."""
        mean, var, count, weight, bias = self.tensors(self.domain)
        if not self.updates_running_statistics:
            mean = var = count = None
        return batch_norm_step(x, mean, var, count, weight, bias, self.momentum, self.eps)

    def evaluate(self, x: Tensor) -> Tensor:
        """Normalize by the statistics of the domain at hand."""
        mean, var, _, weight, bias = self.tensors(self.domain)
        return F.batch_norm(x, mean, var, weight, bias, mean is None, 0.0, self.eps)

    @torch.no_grad()
    def select(self, domain: int, plain_class: type[_BatchNorm] | None = None) -> None:
        """Become a plain layer, in place, with one domain's values in torch's own tensors, which stay the same objects.

        Args:
            domain: The one to keep.
            plain_class: What the layer becomes if it was built as a DomainBatchNorm, ``nn.BatchNorm2d`` for example. A
                layer that was converted becomes what it was.

        Raises:
            BatchNormError: If there is no such domain.
            ConversionError: If it is not known what to become.
        """
        kept, target = self.tensors(domain), self._selected_class(plain_class)
        for name, value in kept._asdict().items():
            own = getattr(self, name)
            if value is not None and value is not own:
                own.copy_(value)
        for key in (*_others(self._buffers), *_others(self._parameters)):
            delattr(self, key)
        forget_variant(self)
        self.__class__ = target  # type: ignore[assignment]
        if issubclass(target, nn.SyncBatchNorm):
            self.__dict__.setdefault("process_group", None)

    def _selected_class(self, plain_class: type[_BatchNorm] | None) -> type[_BatchNorm]:
        target = self.converted_from or plain_class
        if target is None:
            raise ConversionError(
                f"DomainBatchNorm({self.num_features}) was built as one, not converted, so its plain class is not "
                "known. Pass plain_class=, torch.nn.BatchNorm2d for example."
            )
        if not isinstance(target, type) or not issubclass(target, _BatchNorm) or issubclass(target, BatchNormVariant):
            raise ConversionError(
                f"DomainBatchNorm({self.num_features}) cannot become {target!r}: plain_class= takes a plain BatchNorm, "
                "torch.nn.BatchNorm2d for example."
            )
        if self.converted_from is None and self._modules:
            raise ConversionError(
                f"{type(self).__name__}({self.num_features}) holds {', '.join(self._modules)}, which {target.__name__} "
                "would not run. Convert from the class that runs them, and it leads back there."
            )
        return target

    def reset_running_stats(self) -> None:
        """Reset the statistics of the domain at hand, which ``torch.optim.swa_utils.update_bn`` then measures."""
        if self.domain == 0:
            super().reset_running_stats()
            return
        mean, var, count, _, _ = self.tensors(self.domain)
        if mean is not None and var is not None and count is not None:
            mean.zero_(), var.fill_(1), count.zero_()

    def reset_parameters(self) -> None:
        """Reset the statistics, scales to 1 and shifts to 0, in every domain."""
        super().reset_parameters()
        self._restart(self._buffers)
        self._restart(self._parameters)

    @torch.no_grad()
    def _restart(self, held: Mapping[str, Tensor | None]) -> None:
        for key, tensor in _others(held).items():
            tensor.copy_(getattr(self, _domain_0(key)))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        """Load, and from a file with domain 0's tensors alone start the others."""
        for held in (_others(self._buffers), _others(self._parameters)):
            if any(prefix + key in state_dict for key in held):
                continue  # what is missing then is missing
            for key, present in held.items():
                value = state_dict.get(prefix + _domain_0(key))
                if isinstance(value, Tensor):
                    rows = present.shape[: present.dim() - getattr(self, _domain_0(key)).dim()]
                    # Memory of its own, not a view: with assign=True it becomes the tensor that is written to.
                    state_dict[prefix + key] = value.detach().repeat(*rows, *[1] * value.dim())
                elif key == "other_num_batches_tracked" and (local_metadata.get("version") or 1) < 2:
                    state_dict[prefix + key] = present  # as torch does for the files from before there was a count
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def _others(held: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Pick the tensors of the other domains."""
    return {key: tensor for key, tensor in held.items() if key.startswith("other_") and tensor is not None}


def _domain_0(key: str) -> str:
    """Name domain 0's tensor of the same kind: ``weight`` for ``other_weight_2``."""
    return key.removeprefix("other_").rstrip("_0123456789")
