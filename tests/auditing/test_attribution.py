"""What recalibrating one layer would do to the loss: against finite differences, and against a swap made by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from auditing import slow_readings as slow
from torch import nn

from bn_lightning.auditing import audit_batch_norm
from bn_lightning.recalibration import population_statistics


class Twice(nn.Module):
    """Layers of every kind a prediction has to do for; nothing has a kink."""

    def __init__(self):
        super().__init__()
        self.bare = nn.BatchNorm1d(6, affine=False)
        self.shared = nn.BatchNorm1d(6, eps=0.1)
        self.fixed = nn.BatchNorm1d(6)
        self.fixed.requires_grad_(False)
        self.scale = nn.BatchNorm1d(6)
        self.scale.register_parameter("bias", None)  # torch has bias=False since 2.13 only
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = torch.tanh(self.shared(self.mix(self.bare(x))))
        x = torch.tanh(self.shared(self.mix(x)))
        return self.head(self.scale(torch.tanh(self.fixed(input=self.mix(x)))))


def twice():
    source = torch.Generator().manual_seed(0)
    model = Twice().double().eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("var"):
                tensor.copy_(torch.rand(tensor.shape, generator=source, dtype=torch.float64) + 0.5)
            elif name.endswith("tracked"):
                tensor.fill_(100)
            else:
                tensor.copy_(torch.randn(tensor.shape, generator=source, dtype=torch.float64) * 0.7)
    return model


def flat(sizes=(16, 9), seed=1):
    source = torch.Generator().manual_seed(seed)
    return [
        (1 + torch.randn(n, 6, generator=source, dtype=torch.float64), torch.randint(3, (n,), generator=source))
        for n in sizes
    ]


@torch.no_grad()
def deployed(model, batches):
    """The mean over examples."""
    total = sum(float(F.cross_entropy(model(x), y, reduction="sum")) for x, y in batches)
    return total / sum(len(y) for _, y in batches)


def moved(layer, mean, var, share):
    """Buffers that do a share of the change from the running statistics to others, affine in the input."""
    scale = ((layer.running_var + layer.eps) / (var + layer.eps)).sqrt() - 1
    shift = (layer.running_mean - mean) * (1 + scale)
    gain = 1 + share * scale
    return layer.running_mean - share * shift / gain, (layer.running_var + layer.eps) / gain.square() - layer.eps


def loss_with(model, name, statistics, batches):
    model = copy.deepcopy(model)
    layer = model.get_submodule(name)
    with torch.no_grad():
        layer.running_mean.copy_(statistics[0])
        layer.running_var.copy_(statistics[1])
    return deployed(model, batches)


def test_predictions_are_the_derivative_and_confirmed_changes_a_real_swap():
    model, batches = twice(), flat()
    report = audit_batch_norm(model, batches, loss=F.cross_entropy)
    rows = {row.name: row for row in report.layers}
    now = deployed(model, batches)
    assert report.losses.deployed.mean == now, "what the predictions put in changes no bit"
    small, predicted = 1e-5, {}
    for name, each in population_statistics(model, batches, show_progress=False).items():
        layer, mean, var = model.get_submodule(name), each.moments.mean, each.moments.var(correction=1)
        up, down = (loss_with(model, name, moved(layer, mean, var, share), batches) for share in (small, -small))
        predicted[name] = (up - down) / (2 * small)
        assert rows[name].predicted_loss_change == pytest.approx(predicted[name], rel=1e-5, abs=1e-9), name
        if rows[name].confirmed_loss_change is not None:
            swapped = loss_with(model, name, (mean, var), batches)
            assert rows[name].confirmed_loss_change == pytest.approx(swapped - now, rel=1e-9), name
    confirmed = {name for name, row in rows.items() if row.confirmed_loss_change is not None}
    assert confirmed == set(sorted(predicted, key=lambda name: -abs(predicted[name]))[:3])
    assert all(row.reason is None for row in rows.values())


def test_a_small_change_is_predicted_as_it_comes():
    batches = slow.labelled((32,) * 4)
    report = audit_batch_norm(slow.net(drift=0.01, batches=batches), batches, loss=F.cross_entropy)
    for row in report.layers:
        assert row.confirmed_loss_change == pytest.approx(row.predicted_loss_change, rel=0.15)


def test_evaluation_data_have_the_training_statistics_swapped_in():
    model, batches, val_batches = twice(), flat(), flat((7, 20), seed=2)
    report = audit_batch_norm(model, batches, val_batches=val_batches, loss=F.cross_entropy)
    measured = population_statistics(model, batches, show_progress=False)
    confirmed = [row for row in report.layers if row.confirmed_loss_change is not None]
    assert len(confirmed) == 3
    for row in confirmed:
        moments = measured[row.name].moments
        swapped = loss_with(model, row.name, (moments.mean, moments.var(correction=1)), val_batches)
        assert row.confirmed_loss_change == pytest.approx(swapped - deployed(model, val_batches), rel=1e-9)


def test_a_layer_that_is_right_already_is_not_confirmed():
    model, batches = twice(), flat()
    for name, each in population_statistics(model, batches, show_progress=False).items():
        if name != "scale":
            model.get_submodule(name).running_mean.copy_(each.moments.mean)
            model.get_submodule(name).running_var.copy_(each.moments.var(correction=1))
    rows = {row.name: row for row in audit_batch_norm(model, batches, loss=F.cross_entropy).layers}
    assert rows["bare"].predicted_loss_change == 0.0
    assert rows["bare"].confirmed_loss_change is None
    assert rows["scale"].confirmed_loss_change is not None


def test_an_activation_inside_of_the_layer():
    timm_layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(
        nn.Linear(6, 4), nn.Unflatten(1, (4, 1, 1)), timm_layers.BatchNormAct2d(4, act_layer=nn.SiLU), nn.Flatten()
    ).double()
    model[2].running_mean.fill_(0.4)
    model.eval()
    batches = flat()
    row = audit_batch_norm(model, batches, loss=F.cross_entropy).layers[0]
    moments = population_statistics(model, batches, show_progress=False)["2"].moments
    swapped = loss_with(model, "2", (moments.mean, moments.var(correction=1)), batches) - deployed(model, batches)
    assert row.confirmed_loss_change == pytest.approx(swapped, rel=1e-9)
    small = 1e-5
    up, down = (
        loss_with(model, "2", moved(model[2], moments.mean, moments.var(correction=1), share), batches)
        for share in (small, -small)
    )
    assert row.predicted_loss_change == pytest.approx((up - down) / (2 * small), rel=1e-5)


def test_gradients_stay_the_owners(monkeypatch):
    model, batches = twice(), flat()
    deployed_loss = F.cross_entropy(model(batches[0][0]), batches[0][1])
    deployed_loss.backward()
    before = [(id(p.grad), None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    audit_batch_norm(model, batches, loss=F.cross_entropy)
    for (place, value), parameter in zip(before, model.parameters(), strict=True):
        assert id(parameter.grad) == place
        assert value is None or torch.equal(value, parameter.grad)


def told(report):
    return {each.what: each.reason for each in report.not_looked}


@pytest.mark.parametrize(
    ("step", "message"),
    [
        pytest.param(lambda m, b: float(F.cross_entropy(m(b[0]), b[1]).detach()), "a plain number", id="number"),
        pytest.param(lambda m, b: F.cross_entropy(m(b[0]), b[1]).detach(), "detached", id="detached"),
        pytest.param(lambda m, b: F.cross_entropy(torch.no_grad()(m)(b[0]), b[1]), "no_grad", id="no-grad"),
    ],
)
def test_losses_without_a_gradient_are_read_and_say_why_nothing_is_predicted(step, message):
    report = audit_batch_norm(twice(), flat(), step=step)
    assert report.losses.deployed.mean == pytest.approx(deployed(twice(), flat()))
    assert message in told(report)["predicted loss changes"]
    assert all(row.predicted_loss_change is None for row in report.layers)


def test_layers_in_a_reentrant_checkpoint_say_so():
    def step(model, batch):
        x = batch[0].requires_grad_()
        return F.cross_entropy(torch.utils.checkpoint.checkpoint(model, x, use_reentrant=True), batch[1])

    report = audit_batch_norm(twice(), flat(), step=step)
    assert all("use_reentrant=True" in row.reason for row in report.layers)
    assert report.losses.deployed.mean == pytest.approx(deployed(twice(), flat()))


def test_layers_that_no_gradient_reaches_say_so():
    def forward(model, batch):
        with torch.no_grad():
            x = model.bare(batch[0])
        return model.head(model.scale(model.fixed(x)))

    report = audit_batch_norm(twice(), flat(), loss=F.cross_entropy, forward=forward)
    rows = {row.name: row for row in report.layers}
    assert rows["scale"].predicted_loss_change is not None
    assert rows["bare"].predicted_loss_change is None
    assert "no gradient reaches it" in rows["bare"].reason
    assert rows["shared"].reason == "never reached by the data"


def test_frozen_layers_and_such_without_statistics_have_a_reason_and_no_prediction():
    model = twice().train()
    model.bare.eval()
    model.scale = nn.BatchNorm1d(6, track_running_stats=False).double()
    report = audit_batch_norm(model, flat(), loss=F.cross_entropy)
    rows = {row.name: row for row in report.layers}
    assert (rows["bare"].predicted_loss_change, rows["scale"].predicted_loss_change) == (None, None)
    assert rows["bare"].reason.startswith("frozen")
    assert rows["scale"].reason.startswith("no running statistics")
    assert rows["shared"].predicted_loss_change is not None


def test_inference_mode_around_is_no_matter_but_parameters_made_in_it_are():
    with torch.inference_mode():
        report = audit_batch_norm(twice(), flat(), loss=F.cross_entropy)
    assert "made in torch.inference_mode()" in told(report)["predicted loss changes"]
    assert report.losses.deployed.mean == pytest.approx(deployed(twice(), flat()))
    assert not [found for found in report.findings if found.rule == "extra-forward"]
    model, batches = twice(), flat()
    with torch.inference_mode():
        inside = audit_batch_norm(model, [(x.clone(), y.clone()) for x, y in batches], loss=F.cross_entropy)
    assert inside == audit_batch_norm(model, batches, loss=F.cross_entropy)
    assert inside.layers[0].predicted_loss_change
