"""Domain layers with nothing left at its initial value, and comparing what they hold."""

import torch

from bn_lightning.layers.domain import DomainBatchNorm


def randomize(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(0.5 + 1.5 * torch.rand(tensor.shape, generator=generator))
            else:
                tensor.copy_(torch.randint(1, 9, tensor.shape, generator=generator))
    return module


def build(num_domains=3, seed=0, dtype=torch.float64, **options):
    return randomize(DomainBatchNorm(3, num_domains=num_domains, dtype=dtype, **options), seed)


def batch(shape=(6, 3, 4), seed=1, dtype=torch.float64):
    return 3 + 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def numpy(tensor):
    return None if tensor is None else tensor.detach().numpy().copy()


def state(layer):
    return {key: value.clone() for key, value in layer.state_dict().items()}


def assert_same(actual, expected, but=()):
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value) or key in but, key


def of_domain(layer, domain):
    return {key: value.detach() for key, value in layer.tensors(domain)._asdict().items() if value is not None}
