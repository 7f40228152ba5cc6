"""Optimizers and schedules by name, their rates against closed forms."""

import math

import pytest
import torch
from torch import nn

from bn_lightning.errors import BatchNormError
from bn_lightning.modules.optimization import build_optimizer, build_schedule
from bn_lightning.modules.parameter_groups import decay_groups


def groups(weight_decay=0.0):
    return decay_groups(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), weight_decay)


@pytest.mark.parametrize(
    ("name", "options", "kind", "expected"),
    [
        pytest.param("sgd", None, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, id="sgd"),
        pytest.param("sgd", {"momentum": 0.0}, torch.optim.SGD, {"momentum": 0.0, "nesterov": False}, id="plain sgd"),
        pytest.param(
            "sgd", {"nesterov": False}, torch.optim.SGD, {"momentum": 0.9, "nesterov": False}, id="heavy ball"
        ),
        pytest.param("adam", None, torch.optim.Adam, {"betas": (0.9, 0.999)}, id="adam"),
        pytest.param("AdamW", {"betas": (0.9, 0.95)}, torch.optim.AdamW, {"betas": (0.9, 0.95)}, id="adamw"),
        pytest.param("RMSprop", {"alpha": 0.9}, torch.optim.RMSprop, {"alpha": 0.9}, id="rmsprop"),
        pytest.param("nadam", None, torch.optim.NAdam, {}, id="nadam"),
    ],
)
def test_an_optimizer_by_name(name, options, kind, expected):
    optimizer = build_optimizer(name, groups(0.3), 0.05, options)
    assert type(optimizer) is kind
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert {key: optimizer.defaults[key] for key in expected} == expected
    assert {group["lr"] for group in optimizer.param_groups} == {0.05}


def test_decay_is_what_sgd_does_with_it():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    optimizer = build_optimizer("sgd", decay_groups(network, 0.3), 0.1, {"momentum": 0.0})
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter, before[name] * (1 - 0.1 * 0.3 if name == "0.weight" else 1))


@pytest.mark.parametrize(
    ("name", "options", "decay", "message"),
    [
        pytest.param("adamv", None, 0, r"no optimizer 'adamv' \(did you mean 'adam", id="unknown"),
        pytest.param("adam", {"momentum": 0.9}, 0, "Adam cannot be made with .*momentum", id="option of another"),
        pytest.param("adam", {"betas": (2.0, 0.9)}, 0, "Invalid beta parameter", id="value"),
        pytest.param("rprop", None, 0.1, "Rprop knows no weight decay: set weight_decay=0", id="no decay"),
        pytest.param("lbfgs", None, 0, "LBFGS cannot be made", id="no groups"),
    ],
)
def test_an_optimizer_that_does_not_fit_says_why(name, options, decay, message):
    with pytest.raises(BatchNormError, match=message):
        build_optimizer(name, groups(decay), 0.1, options)


def rates(name, options=None, *, steps=12, epochs=6):
    """The rate at every advance of the schedule."""
    optimizer = build_optimizer("sgd", groups(), 0.2)
    made = build_schedule(name, optimizer, options, steps=lambda: steps, epochs=epochs)
    found = []
    for _ in range(steps if made["interval"] == "step" else epochs):
        assert len({group["lr"] for group in optimizer.param_groups}) == 1
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        made["scheduler"].step()
    return found, made["interval"]


def test_cosine_over_all_steps():
    found, interval = rates("cosine", {"eta_min": 0.01})
    assert interval == "step"
    assert found == pytest.approx([0.01 + 0.19 * (1 + math.cos(math.pi * step / 12)) / 2 for step in range(12)])


def test_one_cycle_has_its_peak_at_the_learning_rate():
    found, interval = rates("one_cycle", {"pct_start": 0.5}, steps=21)
    assert interval == "step"
    assert found[0] == pytest.approx(0.2 / 25)
    assert max(found) == pytest.approx(0.2, rel=0.01)
    assert found.index(max(found)) in (9, 10)
    assert found[-1] == pytest.approx(0.2 / 25 / 1e4)


@pytest.mark.parametrize(("epochs", "third"), [(6, 2), (7, 3), (1, 1)])
def test_step_goes_down_at_each_third(epochs, third):
    found, interval = rates("step", epochs=epochs)
    assert interval == "epoch"
    assert found == pytest.approx([0.2 * 0.1 ** (epoch // third) for epoch in range(epochs)])


def test_any_schedule_of_torch_advances_by_epochs():
    found, interval = rates("MultiStepLR", {"milestones": [1, 3], "gamma": 0.5}, epochs=4)
    assert interval == "epoch"
    assert found == pytest.approx([0.2, 0.1, 0.1, 0.05])


@pytest.mark.parametrize("name", ["constant", "none"])
def test_no_schedule(name):
    assert build_schedule(name, build_optimizer("sgd", groups(), 0.1), steps=lambda: 1, epochs=1) is None


@pytest.mark.parametrize(
    ("name", "options", "steps", "epochs", "message"),
    [
        pytest.param("cosin", None, 5, 1, r"'cosin' \(did you mean 'cosine'\?\); there are one_cycle", id="unknown"),
        pytest.param("cosine", {"gamma": 1}, 5, 1, "CosineAnnealingLR cannot be made with .*gamma", id="option"),
        pytest.param("constant", {"gamma": 1}, 5, 1, "'constant' takes no options", id="option of none"),
        pytest.param(
            "cosine", None, math.inf, -1, r"give Trainer\(max_steps=…\), or schedule='constant'", id="endless"
        ),
        pytest.param("one_cycle", None, -1, 1, r"give Trainer\(max_steps=…\)", id="endless iterable"),
        pytest.param("step", None, 5, -1, "schedule_options={'step_size': …}, in epochs", id="no epochs"),
        pytest.param("LambdaLR", None, 5, 1, "LambdaLR cannot be made", id="takes a function"),
    ],
)
def test_a_schedule_that_does_not_fit_says_why(name, options, steps, epochs, message):
    with pytest.raises(BatchNormError, match=message):
        build_schedule(name, build_optimizer("sgd", groups(), 0.1), options, steps=lambda: steps, epochs=epochs)
