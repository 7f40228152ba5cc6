"""The static rules say nothing above a note about networks in which nothing is wrong, in either mode."""

import pytest
import torch

from bn_lightning import audit_batch_norm, recalibrate_batch_norm
from bn_lightning.zoo import load_zoo_model

pytest.importorskip("timm")
pytest.importorskip("torchvision")

FAMILIES = (
    "timm:test_resnet",
    "timm:test_efficientnet",
    "timm:test_byobnet",
    "timm:mobilenetv3_small_050",
    "timm:regnetx_002",
    "timm:repvgg_a0",
    "timm:ghostnet_050",
    "timm:hrnet_w18_small",
    "torchvision:resnet18",
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:mnasnet0_5",
    "torchvision:googlenet",
)


@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet:FutureWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_zoo_network_is_left_in_peace(name):
    torch.manual_seed(0)
    model = load_zoo_model(name).eval()
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    for recalibrated in (False, True):
        if recalibrated:
            recalibrate_batch_norm(model.eval(), [images, images.flip(0)])
        for mode in (True, False):
            report = audit_batch_norm(model.train(mode), example_inputs=images[:1], optimizer=optimizer)
            assert report.exit_code("warning") == 0, str(report)
            assert "recorded forward pass" not in {each.what for each in report.not_looked}
