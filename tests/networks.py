"""Networks for the tests: those of torchvision, timm and efficientnet-lite-pytorch, and small ones in plain torch.nn.

The libraries are the Makefile's TEST_MODELS, installed without their dependencies, since only definitions are used.
"""

import copy
import functools
import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from effnet_aot.model import ModelNew, batch_norms, calibrate_batch_norm, reference_network

CLASSES = 101


def images(*shape, device="cpu", dtype=torch.float32, seed=5):
    """Noise around a colour, which makes a difference after a global average, too."""
    generator = torch.Generator().manual_seed(seed)
    noise, colour = torch.randn(shape, generator=generator), torch.randn(*shape[:2], 1, 1, generator=generator)
    return (noise + colour).to(device, dtype)


def import_torchvision():
    """Also where torchvision was built for another torch than this one, whose operators its definitions then miss."""
    library = Path(importlib.util.find_spec("torchvision").origin).with_name("_C.so")
    try:
        torch.ops.load_library(library)
    except OSError:
        fragment = import_torchvision.fragment = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                fragment.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

    return torchvision


def torchvision_model(name):
    return lambda: import_torchvision().models.get_model(name, num_classes=CLASSES)


def timm_model(name):
    def build():
        import_torchvision()  # timm imports it
        import timm

        return timm.create_model(name, num_classes=CLASSES)

    return build


def efficientnet_lite_pytorch(name):
    def build():
        from efficientnet_lite_pytorch import EfficientNet

        return EfficientNet.from_name(name, num_classes=CLASSES)

    return build


STOCK = {
    "torchvision.mobilenet_v2": torchvision_model("mobilenet_v2"),
    "torchvision.mnasnet1_0": torchvision_model("mnasnet1_0"),
    **{
        f"timm.{name}": timm_model(name)
        for name in ("mobilenetv2_100", "mobilenetv2_050", "efficientnet_lite0", "efficientnet_lite4", "tf_efficientnet_lite0", "mnasnet_100")
    },
    "efficientnet_lite_pytorch": efficientnet_lite_pytorch("efficientnet-lite0"),
    "ModelNew": lambda: ModelNew(CLASSES),
    "reference_network": lambda: reference_network(CLASSES),
}


def is_installed(name):
    packages = {"timm": ["torchvision", "timm"], "ModelNew": [], "reference_network": []}
    return all(map(importlib.util.find_spec, packages.get(family := name.split(".")[0], [family])))


def stock(name):
    """A network of STOCK, float32 on the CPU, in eval mode, with batch norms through which the signal passes."""
    return copy.deepcopy(_stock(name))


@functools.cache
def _stock(name):
    torch.manual_seed(0)
    return trained(STOCK[name](), images(8, 3, 128, 128))  # with fewer pixels the last maps give poor statistics


@torch.no_grad()
def trained(model, x):
    """As if it had been trained: random affine parameters and biases, batch statistics of x. In eval mode."""
    generator = torch.Generator().manual_seed(1)
    for bn in batch_norms(model):
        if bn.affine:
            bn.weight.copy_(torch.rand(bn.weight.shape, generator=generator) + 0.5)
            bn.bias.copy_(torch.randn(bn.bias.shape, generator=generator) * 0.5)
    return calibrate_batch_norm(model, x).eval()


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation with SiLU, as EfficientNet has it."""

    def __init__(self, channels):
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // 4, 1)
        self.expand = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True)))))


class EfficientNetLike(nn.Module):
    """Stem, one MBConv block with squeeze-and-excitation, head: SiLU throughout."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 16, 3, 2)
        self.expand = conv_bn(16, 64, 1)
        self.depthwise = conv_bn(64, 64, 3, groups=64)
        self.excite = SqueezeExcite(64)
        self.project = conv_bn(64, 16, 1)
        self.head = conv_bn(16, 32, 1)
        self.fc = nn.Linear(32, 10)

    def forward(self, x):
        x = F.silu(self.stem(x), inplace=True)
        y = F.silu(self.expand(x), inplace=True)
        y = self.excite(F.silu(self.depthwise(y), inplace=True))
        x = x + self.project(y)
        return self.fc(F.silu(self.head(x)).mean((2, 3)))


class ResNetLike(nn.Module):
    """A bottleneck block with a projection on the shortcut."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 32, 7, 2)
        self.conv1 = conv_bn(32, 24, 1)
        self.conv2 = conv_bn(24, 24, 3)
        self.conv3 = conv_bn(24, 96, 1)
        self.shortcut = conv_bn(32, 96, 1)
        self.fc = nn.Linear(96, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem(x), inplace=True), 3, 2, 1)
        y = F.relu(self.conv1(x), inplace=True)
        y = F.relu(self.conv2(y), inplace=True)
        y = self.conv3(y)
        y += self.shortcut(x)
        return self.fc(F.adaptive_avg_pool2d(F.relu(y, inplace=True), 1).flatten(1))


class AttentionNet(nn.Module):
    """A convolution, and self-attention over its pixels."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 16, 3, 2)
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = F.relu(self.stem(x)).flatten(2).transpose(1, 2)
        y = self.norm(x)
        return self.fc((x + self.attention(y, y, y, need_weights=False)[0]).mean(1))


def conv_bn(in_channels, out_channels, kernel, stride=1, **options):
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False, **options), nn.BatchNorm2d(out_channels))
