"""What the tests of RecalibrateBatchNorm train, and how they tell what it should have found."""

import warnings

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from population_truth import batch_norms, pooled_float64
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

BATCH = 8


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def examples(number=44, seed=1):
    g = seeded(seed)
    return TensorDataset(1 + 2 * torch.randn(number, 3, 5, 5, generator=g), torch.randint(0, 2, (number,), generator=g))


def loader(**options):
    return DataLoader(examples(), BATCH, **options)


class Lit(pl.LightningModule):
    """A convolution and a linear with BN, dropout between; ``seen`` is the state it was validated in, each time."""

    def __init__(self, middle=nn.BatchNorm2d):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3), middle(4), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(36, 2), nn.BatchNorm1d(2)
        )
        with torch.no_grad():
            for layer in batch_norms(self).values():
                layer.weight.uniform_(0.5, 1.5, generator=seeded(2))
                layer.bias.normal_(generator=seeded(3))
        self.seen, self.losses = [], []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x + 0.1 * torch.randn_like(x)), y)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        if batch_idx == 0:
            self.seen.append(copied(self))
        self.log("val", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def copied(module):
    return {key: value.detach().clone() for key, value in module.state_dict().items()}


def quiet(function, *arguments, **options):
    """Let Lightning's advice pass, but none of the callback's own warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="RecalibrateBatchNorm")
        return function(*arguments, **options)


def trainer(*callbacks, family=pl, **options):
    options = {"max_epochs": 2, "logger": False, "accelerator": "cpu", "num_sanity_val_steps": 1,
               "enable_checkpointing": False, **options}  # fmt: skip
    return quiet(
        family.Trainer, callbacks=list(callbacks), enable_progress_bar=False, enable_model_summary=False, **options
    )


def fit(*callbacks, module=None, data=None, ckpt_path=None, **options):
    torch.manual_seed(7)
    module = Lit() if module is None else module
    fitter = trainer(*callbacks, **options)
    quiet(
        fitter.fit, module, loader() if data is None else data, DataLoader(examples(16, 5), BATCH), ckpt_path=ckpt_path
    )
    return module, fitter


def is_population(state, batches=None):
    """Whether a state's running statistics are the training set's under its own weights, in float64."""
    module = Lit()
    module.load_state_dict(state)
    batches = [x for x, _ in loader()] if batches is None else batches
    errors = []
    for name, (_, mean, var) in pooled_float64(module, batches).items():
        errors.append(((state[f"{name}.running_mean"].double() - mean) / var.sqrt()).abs().max())
        errors.append((state[f"{name}.running_var"].double() / var - 1).abs().max())
    return bool(max(errors) < 1e-5)


def same(one, two, but=()):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one if not key.endswith(but))
