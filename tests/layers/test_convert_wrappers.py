"""What is around a model: compiled code takes the new class up, DDP and sharding are respected."""

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

import bn_lightning as bnl
from bn_lightning.errors import ConversionError
from bn_lightning.layers import FrozenBatchNorm, GhostBatchNorm


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 1.5)
    return model


def images():
    return torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("how", ["wrapped", "in place", "layer"])
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo's own, of any module compiled inside another
def test_a_model_that_ran_compiled_takes_the_new_class_up(how):
    torch._dynamo.reset()
    model = called = net()
    if how == "wrapped":
        called = torch.compile(model, backend="aot_eager")
    else:
        (model if how == "in place" else model[1]).compile(backend="aot_eager")
    plain = called(images())

    report = bnl.convert_batch_norm(called, "ghost", virtual_batch_size=2)
    eager = net()
    bnl.convert_batch_norm(eager, "ghost", virtual_batch_size=2)
    assert [row.name for row in report.rows] == ["1"]
    torch.testing.assert_close(called(images()), eager(images()))
    bnl.convert_batch_norm(called, "ghost", virtual_batch_size=4)
    bnl.convert_batch_norm(eager, "ghost", virtual_batch_size=4)
    torch.testing.assert_close(called(images()), eager(images()))
    bnl.revert_batch_norm(called)
    torch.testing.assert_close(called(images()), plain)


def test_groups_in_a_compiled_model():
    torch._dynamo.reset()
    model = net()
    called = torch.compile(model, backend="aot_eager")
    called(images())
    report = bnl.convert_batch_norm(called, "group", num_groups=4)
    x = model[0](images())
    expected = torch.relu(nn.functional.instance_norm(x, weight=model[1].weight, bias=model[1].bias))
    torch.testing.assert_close(called(images()), expected, rtol=1e-4, atol=1e-5)
    report.undo()
    again = net()
    again(images())
    torch.testing.assert_close(called.eval()(images()), again.eval()(images()))


def test_data_parallel_is_looked_through():
    model = DataParallel(net())
    bnl.convert_batch_norm(model, "ghost", include=["1"])
    assert type(model.module[1]) is GhostBatchNorm


@pytest.mark.usefixtures("process_group")
def test_ddp_is_looked_through_and_keeps_reducing():
    model = DistributedDataParallel(net())
    report = bnl.convert_batch_norm(model, "ghost", virtual_batch_size=2)
    assert report.rows[0].name == "1"
    model(images()).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    bnl.convert_batch_norm(model, "frozen")
    assert type(model.module[1]) is FrozenBatchNorm


@pytest.mark.parametrize("inside", [False, True], ids=["root", "inside another module"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("frozen", {"trainable": False}),
        ("domain", {"per_domain_affine": True}),
        ("domain", {}),
        ("group", {"num_groups": 2}),
    ],
    ids=str,
)
@pytest.mark.usefixtures("process_group")
def test_under_ddp_what_changes_its_inventory_is_refused(name, options, inside):
    wrapped = DistributedDataParallel(net())
    model = nn.ModuleDict({"net": wrapped}) if inside else wrapped
    keys = list(model.state_dict())
    with pytest.raises(ConversionError, match=r"'1' would have other parameters.*Convert before wrapping"):
        bnl.convert_batch_norm(model, name, **options)
    assert type(wrapped.module[1]) is nn.BatchNorm2d
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.usefixtures("process_group")
def test_a_sharded_model_is_refused():
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    model = nn.Sequential(net(), nn.BatchNorm2d(4))
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    fsdp.fully_shard(model[0], mesh=mesh)
    for change in (lambda: bnl.convert_batch_norm(model, "ghost"), lambda: bnl.revert_batch_norm(model)):
        with pytest.raises(ConversionError, match=r"'0' is sharded over processes.*Convert before fully_shard"):
            change()
    assert type(model[1]) is nn.BatchNorm2d


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore")
def test_fsdp_of_the_first_kind_and_dtensors_are_refused():
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    with pytest.raises(ConversionError, match="is sharded over processes"):
        bnl.convert_batch_norm(fsdp.FullyShardedDataParallel(net(), device_id=torch.device("cpu")), "ghost")
    tensor = pytest.importorskip("torch.distributed.tensor")
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    model = net()
    model[0].weight = nn.Parameter(tensor.distribute_tensor(model[0].weight.detach(), mesh))
    with pytest.raises(ConversionError, match="'0' is sharded over processes"):
        bnl.convert_batch_norm(model, "ghost")
