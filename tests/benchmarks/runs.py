"""The trainings of false_alarms.py: healthy ones, and ones with one fault each."""

from functools import partial

import torch
from torch import nn
from trainings import Training

from bn_lightning.layers import convert_batch_norm
from bn_lightning.networks import ResidualNetwork


def mlp(widths=(256, 256, 128), act=nn.ReLU, norm=True, momentum=0.1, dropout=0.0, gain=None):
    layers, inputs = [nn.Flatten()], 64
    for width in widths:
        layers.append(nn.Linear(inputs, width, bias=not norm))
        if norm:
            layers.append(nn.BatchNorm1d(width, momentum=momentum))
        layers.append(act())
        if dropout:
            layers.append(nn.Dropout(dropout))
        inputs = width
    net = nn.Sequential(*layers, nn.Linear(inputs, 10))
    if gain is not None:
        for layer in net:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=gain / layer.in_features**0.5)
                nn.init.zeros_(layer.bias)
    return net


def layer_norm_mlp():
    return nn.Sequential(
        nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 10)
    )


def log_softmax_mlp():
    return nn.Sequential(*mlp((256, 128), norm=False), nn.LogSoftmax(dim=1))


def vgg(widths=(16, 32, 64), act=nn.ReLU, norm=True, kaiming=False):
    layers, inputs = [], 1
    for width in widths:
        for channels in (inputs, width):
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=not norm)]
            layers += [nn.BatchNorm2d(width)] if norm else []
            layers += [act()]
        layers.append(nn.MaxPool2d(2))
        inputs = width
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs, 10))
    if kaiming:
        for layer in net:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return net


def residual(kind=None, zero_gamma=False, momentum=0.1, widths=(8, 16, 32), blocks=1, **options):
    net = ResidualNetwork(widths=widths, blocks=blocks)
    for name, layer in net.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = momentum
            if zero_gamma and name.endswith("bn2"):
                nn.init.zeros_(layer.weight)
    if kind:
        convert_batch_norm(net, kind, **options)
    return net


def frozen_below():
    net = residual()
    net.stem.requires_grad_(False)
    net.stages[0].requires_grad_(False)
    return net


sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=5e-4)
slow = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
adam = partial(torch.optim.Adam, lr=1e-3)
adamw = partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.05)

HEALTHY = [
    Training("MLP, BN, SGD", mlp, sgd),
    Training("MLP, no norm, SGD", partial(mlp, norm=False), sgd),
    Training("MLP, no norm, SGD, to zero loss", partial(mlp, norm=False), partial(sgd, weight_decay=0.0), steps=3001),
    Training("MLP, BN, Adam, to zero loss", mlp, partial(adam, lr=3e-3), steps=3001),
    Training("MLP, LogSoftmax, NLL, to zero loss", log_softmax_mlp, slow, steps=3001, loss=nn.functional.nll_loss),
    Training("MLP, GELU, no norm, Adam", partial(mlp, act=nn.GELU, norm=False), adam),
    Training("MLP, tanh, no norm, SGD", partial(mlp, act=nn.Tanh, norm=False), slow),
    Training("MLP, two sigmoids, Adam", partial(mlp, (128, 64), act=nn.Sigmoid, norm=False), partial(adam, lr=5e-3)),
    Training(
        "MLP 1024 wide, dropout, Adam, batch 16",
        partial(mlp, (1024,) * 3, norm=False, dropout=0.3),
        partial(adam, lr=3e-4),
        16,
    ),
    Training("MLP, LayerNorm, GELU, Adam", layer_norm_mlp, partial(adam, lr=3e-3)),
    Training("MLP 12 deep, BN, SGD", partial(mlp, (64,) * 12), slow),
    Training("MLP 8 deep, no norm, He init, Adam", partial(mlp, (64,) * 8, norm=False, gain=2**0.5), adam),
    Training("VGG, BN, SGD, warm-up and cosine", vgg, partial(sgd, lr=0.1), warmup=50, decay=True),
    Training("VGG, no norm, He init, Adam", partial(vgg, norm=False, kaiming=True), adam),
    Training("VGG, BN, SiLU, AdamW", partial(vgg, act=nn.SiLU), adamw),
    Training("VGG, BN, leaky ReLU, batch 1024", partial(vgg, act=nn.LeakyReLU), partial(sgd, lr=0.1), 1024, 151),
    Training("residual, BN, SGD, cosine", residual, partial(sgd, lr=0.1), decay=True),
    Training("residual, BN, Adam, batch 8", residual, adam, 8, 1201),
    Training("residual, BN, SGD, 4 × 16 accumulated", residual, sgd, 16, 401, accumulate=4),
    Training("residual, zero γ, warm-up", partial(residual, zero_gamma=True), partial(sgd, lr=0.1), warmup=100),
    Training("residual, group norm, Adam", partial(residual, "group"), partial(adam, lr=3e-3)),
    Training("residual, ghost, batch 256", partial(residual, "ghost", virtual_batch_size=32), sgd, 256, 401),
    Training("residual, BN, momentum 0.01", partial(residual, momentum=0.01), sgd, steps=1001),
    Training("residual 18 deep, BN, SGD", partial(residual, blocks=3), sgd, steps=301),
    Training("residual, first stages frozen", frozen_below, sgd),
    Training("residual, BN, bfloat16", residual, sgd, dtype=torch.bfloat16, steps=301),
    Training("residual, BN, float16, gradient scaler", residual, sgd, dtype=torch.float16, steps=301),
    Training("MLP, no norm, float16, gradient scaler", partial(mlp, norm=False), adam, dtype=torch.float16),
    Training(
        "residual, float16, scale found by overflows", residual, sgd, dtype=torch.float16, loss_scale=2.0**24, steps=101
    ),
]


def at(step, fault):
    """Change the network once, before the step."""

    def before(network, now):
        if now == step:
            with torch.no_grad():
                fault(network)

    return before


def negative_bias(network):
    next(layer for layer in network if isinstance(layer, nn.Linear)).bias.fill_(-100.0)


def scaled(index, factor):
    """Multiply the weight of one of the linear or convolutional layers."""

    def fault(network):
        layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        layers[index].weight.mul_(factor)

    return fault


def infinite_variance(network):
    next(layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)).running_var.fill_(torch.inf)


def images_from(step, change):
    return lambda images, now: change(images) if now >= step else images


class Root(nn.Module):
    def forward(self, x):
        return x.sqrt()


def rooted():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), Root(), nn.Linear(64, 10))


plain = partial(mlp, norm=False)
deep = partial(mlp, (64,) * 12, norm=False)
hardly = partial(torch.optim.SGD, lr=1e-9)

SICK = [
    Training("learning rate 100", plain, partial(sgd, lr=100.0), expected=("nonfinite",)),
    Training("learning rate 1, GELU", partial(plain, act=nn.GELU), partial(sgd, lr=1.0), expected=("nonfinite",)),
    Training("NaN in the images", mlp, sgd, images=images_from(300, lambda x: x / 0), expected=("nonfinite",)),
    Training("root of 0 in the network", rooted, sgd, steps=1, expected=("nonfinite-gradient",)),
    Training("bias of -100", plain, sgd, before_step=at(100, negative_bias), expected=("dead",)),
    Training("learning rate 3, ReLU", plain, partial(sgd, lr=3.0), expected=("dead",)),
    Training("Adam at 0.1, ReLU", plain, partial(adam, lr=0.1), expected=("dead",)),
    Training("VGG without norm, Adam at 0.1", partial(vgg, norm=False), partial(adam, lr=0.1), expected=("dead",)),
    Training(
        "float16, images × 20,000",
        plain,
        hardly,
        images=images_from(0, lambda x: 2e4 * x),
        dtype=torch.float16,
        steps=201,
        expected=("saturation",),
    ),
    Training(
        "float16, a weight × 60,000 at step 10",
        plain,
        hardly,
        before_step=at(10, scaled(1, 6e4)),
        dtype=torch.float16,
        steps=101,
        expected=("saturation", "nonfinite"),
    ),
    Training(
        "images × 255 from step 300",
        plain,
        partial(sgd, lr=1e-3),
        images=images_from(300, lambda x: 255 * x),
        expected=("scale-jump",),
    ),
    Training(
        "a weight × 8 at step 12, VGG",
        partial(vgg, norm=False, kaiming=True),
        partial(adam, lr=1e-4),
        before_step=at(12, scaled(2, 8)),
        steps=101,
        expected=("scale-jump",),
    ),
    Training(
        "a weight × 20 at step 420",
        plain,
        partial(sgd, lr=1e-3),
        before_step=at(420, scaled(1, 20)),
        expected=("scale-jump",),
    ),
    Training(
        "last weight × 300 at step 300",
        plain,
        partial(sgd, lr=1e-4),
        before_step=at(300, scaled(-1, 300)),
        expected=("scale-jump",),
    ),
    Training(
        "8 sigmoids deep", partial(mlp, (64,) * 8, act=nn.Sigmoid, norm=False), sgd, expected=("vanishing-gradient",)
    ),
    Training("12 sigmoids deep", partial(deep, act=nn.Sigmoid), sgd, expected=("vanishing-gradient",)),
    Training("12 ReLUs deep, weights too small", partial(deep, gain=0.3), sgd, expected=("vanishing-gradient",)),
    Training("12 ReLUs deep, weights too large", partial(deep, gain=5.0), hardly, expected=("exploding-gradient",)),
    Training(
        "12 tanhs deep, weights too large",
        partial(deep, act=nn.Tanh, gain=8.0),
        hardly,
        expected=("exploding-gradient",),
    ),
    Training("momentum 0.001", partial(residual, momentum=0.001), sgd, steps=651, expected=("drift",)),
    Training(
        "images that shift by 2 every 20 steps",
        mlp,
        sgd,
        images=lambda x, step: x + 2 * (step // 20),
        expected=("drift",),
    ),
    Training(
        "infinite running variance",
        residual,
        sgd,
        steps=101,
        before_step=at(60, infinite_variance),
        expected=("nonfinite-statistics",),
    ),
]
