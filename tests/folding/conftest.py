"""What the folding tests share."""

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def _randomize(model, seed=0):
    """Give every BN statistics, weights and biases that are not the neutral ones, and the model evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                if module.running_mean is not None:
                    module.running_mean.normal_(0.3, 0.5, generator=generator)
                    module.running_var.uniform_(0.2, 3.0, generator=generator)
                if module.weight is not None:
                    module.weight.normal_(0.5, 1.0, generator=generator)
                if module.bias is not None:
                    module.bias.normal_(-0.2, 0.5, generator=generator)
    return model.eval()


def _fingerprint(model):
    """Everything that undo has to restore, as comparable values."""
    return {
        "state": {
            key: (value.dtype, value.stride(), value.flatten().tolist()) for key, value in model.state_dict().items()
        },
        "order": list(model.state_dict()),
        "parameters": [(name, id(tensor), tensor.requires_grad) for name, tensor in model.named_parameters()],
        "buffers": [(name, id(tensor)) for name, tensor in model.named_buffers()],
        "memory": [(name, tensor.data_ptr()) for name, tensor in model.named_parameters()],
        "modules": [
            (name, id(module), module.training) for name, module in model.named_modules(remove_duplicate=False)
        ],
        "none": [
            (name, key)
            for name, module in model.named_modules()
            for key, tensor in module._parameters.items()
            if tensor is None
        ],
        "gradients": [None if tensor.grad is None else tensor.grad.tolist() for tensor in model.parameters()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "rng": torch.get_rng_state().tolist(),
    }


@pytest.fixture
def randomize():
    return _randomize


@pytest.fixture
def fingerprint():
    return _fingerprint


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def images():
    return torch.randn(3, 6, 7, 7, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def small_net(randomize):
    """Two folds and one BN that stays between two activations, one of them in place."""
    return randomize(
        nn.Sequential(
            nn.Conv2d(6, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.BatchNorm2d(8),
            nn.Sequential(nn.Tanh(), nn.Flatten()),
            nn.Linear(200, 4),
            nn.BatchNorm1d(4),
        )
    )
