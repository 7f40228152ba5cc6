"""A network with BatchNorm of several kinds, and all that can be told about it."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class Net(nn.Module):
    """One BatchNorm of each kind, one of them used twice under two names, one without statistics."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8, eps=1e-3, momentum=0.3)
        self.again = self.bn
        self.block = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.head = nn.Linear(8, 6)
        self.flat = nn.BatchNorm1d(6, affine=False)

    def forward(self, x):
        x = self.again(self.bn(self.conv(x)))
        return self.flat(self.head(self.block(x).mean((2, 3))))


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return randomized(Net()).to(dtype)


def randomized(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("tracked"):
                tensor.fill_(7)
            elif name.endswith("var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            else:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


def images(batch=6):
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def layers(model):
    return [module for module in model.modules() if isinstance(module, _BatchNorm | nn.GroupNorm)]


def kinds(model):
    return [type(module) for module in layers(model)]


def everything(model):
    """What a model is, down to identities and bits."""
    return (
        [(name, type(module), sorted(module.__dict__)) for name, module in model.named_modules(remove_duplicate=False)],
        [(name, id(module), module.training) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad, p.detach().clone().numpy().tobytes()) for name, p in model.named_parameters()],
        [(name, id(b), b.clone().numpy().tobytes()) for name, b in model.named_buffers()],
        [{k: v for k, v in m.__dict__.items() if not isinstance(v, dict | set)} for m in model.modules()],
        [[(k, list(v)) for k, v in m.__dict__.items() if isinstance(v, dict | set)] for m in model.modules()],
    )
