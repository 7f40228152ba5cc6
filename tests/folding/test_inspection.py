"""What `inspect_batch_norm` says of each layer, against what the network was built to be."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bn_lightning as bnl
from bn_lightning.errors import BatchNormError, FoldError


class Net(nn.Module):
    """Layers of every state, not defined in the order in which they run."""

    def __init__(self):
        super().__init__()
        self.unused = nn.BatchNorm2d(3)
        self.last = nn.BatchNorm2d(4, affine=False, momentum=None)
        self.first, self.conv = nn.BatchNorm2d(4, eps=1e-3, momentum=0.01), nn.Conv2d(3, 4, 3)
        self.twice = nn.BatchNorm2d(4)
        self.batch = nn.BatchNorm2d(4, track_running_stats=False)
        self.twice.requires_grad_(False)
        with torch.no_grad():
            self.first.running_mean.fill_(1)
            self.twice.running_var[1] = torch.nan
            self.last.running_mean.fill_(0.5)

    def forward(self, x):
        x = self.first(self.conv(x))
        x = self.twice(self.twice(x.relu()).tanh()) + x
        x = F.batch_norm(self.batch(x), torch.zeros(4), torch.ones(4))
        return self.last(x)


def inspected(**options):
    return bnl.inspect_batch_norm(Net(), torch.randn(2, 3, 6, 6), **options)


def test_each_layer_stands_where_it_runs_with_what_feeds_and_reads_it():
    rows = {row.name: row for row in inspected().rows}
    assert list(rows) == ["first", "twice", "batch", "last", "unused"]
    assert [row.place for row in rows.values()] == [1, 2, 3, 4, None]
    assert [row.calls for row in rows.values()] == [1, 2, 1, 1, 0]
    assert rows["first"].fed_by == ("conv2d in 'conv'",)
    assert rows["first"].read_by == ("relu", "add")
    assert rows["twice"].fed_by == ("relu", "tanh")
    assert rows["twice"].read_by == ("tanh", "add")
    assert rows["last"].read_by == ("the output",)
    assert rows["unused"].fed_by == rows["unused"].read_by == ()


def test_the_state_is_told_where_it_is_unlike_most():
    rows = {row.name: row for row in inspected().rows}
    assert rows["first"].remarks == ("training mode", "eps 0.001", "momentum 0.01")
    assert rows["twice"].remarks == (
        "called 2 times",
        "statistics of 1 channel not finite, or of negative variance",
        "training mode",
        "γ, β not trained",
    )
    assert rows["batch"].remarks == ("no running statistics", "training mode")
    assert rows["last"].remarks == ("training mode", "no γ, β", "averages all batches")
    assert rows["unused"].remarks == ("not reached by these inputs", "fresh statistics", "training mode")
    assert (rows["first"].eps, rows["first"].momentum, rows["first"].updates, rows["first"].channels) == (
        1e-3,
        0.01,
        0,
        4,
    )


def test_folding_is_what_plan_fold_says():
    model, x = Net(), torch.randn(2, 3, 6, 6)
    found = bnl.inspect_batch_norm(model, x)
    plan = {row.name: row for row in bnl.plan_fold(model.eval(), x).rows}
    assert {row.name: row.folds for row in found.rows} == {row.name: plan[row.name] for row in found.rows}
    assert [row for row in plan.values() if row.name not in {each.name for each in found.rows}] == [*found.functional]
    assert len(found.functional) == 1


def test_the_network_is_given_back_bit_for_bit():
    torch.manual_seed(0)
    model = Net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    bnl.inspect_batch_norm(model, torch.randn(2, 3, 6, 6))
    assert [module.training for module in model.modules()] == modes
    for key, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(7), before[key].nan_to_num(7)), key


def test_it_shows_itself():
    found = inspected()
    printed = str(found)
    assert printed.startswith("Net: 5 BatchNorm layers, of which 1 can be folded; 1 more by function alone")
    assert "all of them: training mode" in printed
    assert "not_reached, in 'unused': no example call reaches it" in printed
    assert "<table>" in found._repr_html_()
    assert json.loads(json.dumps(found.to_dict()))["rows"][0]["folds"]["into"] == "conv"
    (only,) = inspected(include=["fir*"]).rows
    assert (only.name, only.place) == ("first", 1)


def test_what_cannot_be_inspected_is_told():
    with pytest.raises(FoldError, match="has no BatchNorm layer"):
        bnl.inspect_batch_norm(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(BatchNormError, match="zzz"):
        inspected(include=["zzz"])
    with pytest.raises(FoldError, match="could not run"):
        bnl.inspect_batch_norm(Net(), torch.zeros(1, 7))
