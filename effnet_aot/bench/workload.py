"""One network and its images, the same for every way of computing it, and the answer in float64."""

import copy
from functools import cached_property
from typing import NamedTuple

import torch

from ..fold import fold_batch_norm
from ..model import batch_norms, calibrate_batch_norm, reference_network

CHECKED = 8  # images compared with float64: the first ones


class Point(NamedTuple):
    """What is timed: dtype ("float16"), images in the batch, their height and width."""

    dtype: str
    batch: int
    size: int

    def __str__(self):
        return f"{self.dtype}, batch {self.batch}, {self.size} x {self.size}"


class Workloads:
    """Makes the workload of a point. All have one network, up to its dtype, and a batch is the beginning of a larger one."""

    def __init__(self, device, num_classes=1000):
        self.device, self.num_classes = device, num_classes
        self._networks, self._images = {}, {}

    @cached_property
    def float32(self):
        """Random weights, and batch norms that do something: their statistics are those of the data."""
        torch.manual_seed(0)
        network = reference_network(self.num_classes)
        with torch.no_grad():
            for bn in batch_norms(network):
                bn.weight.uniform_(0.5, 1.5)
                bn.bias.normal_(0, 0.5)
        return calibrate_batch_norm(network.to(self.device), self.images(8, 128)).eval()

    def images(self, batch, size):
        """The first of 32 random images, over and over."""
        if size not in self._images:
            self._images[size] = torch.randn(32, 3, size, size, generator=torch.Generator().manual_seed(1)).to(self.device)
        return self._images[size].repeat(-(-batch // 32), 1, 1, 1)[:batch].contiguous()

    def network(self, dtype):
        if dtype not in self._networks:
            self._networks[dtype] = copy.deepcopy(self.float32).to(getattr(torch, dtype)).requires_grad_(False)
        return self._networks[dtype]

    def __call__(self, point):
        return Workload(point, self.network(point.dtype), self.images(point.batch, point.size).to(getattr(torch, point.dtype)))


class Workload:
    """network: plain torch.nn, contiguous, in eval mode and the point's dtype. x: images (batch, 3, size, size)."""

    def __init__(self, point, network, x):
        self.point, self.network, self.x = point, network, x

    @cached_property
    def expected(self):
        """The float64 logits of the first images, by the weights as the dtype holds them."""
        with torch.no_grad():
            return copy.deepcopy(self.network).double()(self.x[:CHECKED].double())

    def errors(self, logits):
        """(root mean square, largest) error of the first images, relative to the root mean square of the logits."""
        expected = self.expected
        error = (torch.as_tensor(logits)[:CHECKED].to(expected) - expected) / expected.square().mean().sqrt()
        return error.square().mean().sqrt().item(), error.abs().max().item()


def load_workload(state, point, device):
    """The workload of a point in another process, to which `state`, a file, brings the network's state_dict()."""
    tensors = torch.load(state, map_location=device, weights_only=True)
    with torch.device("meta"):
        network = reference_network(tensors["fc.bias"].numel())
    network.load_state_dict(tensors, assign=True)
    images = Workloads(device).images(point.batch, point.size)
    return Workload(point, network.eval().requires_grad_(False), images.to(getattr(torch, point.dtype)))


def layers(network):
    """The (convolution, batch norm, activation) triples of the plain network, in order."""
    found = [[network.conv1, network.bn1, "relu"]]
    for i in range(1, 8):
        for layer in getattr(network, f"mbconv{i}"):
            if isinstance(layer, torch.nn.Conv2d):
                found.append([layer, None, "none"])
            elif isinstance(layer, torch.nn.BatchNorm2d):
                found[-1][1] = layer
            else:
                found[-1][2] = "relu6"
    return [*found, [network.conv2, network.bn2, "relu"]]


@torch.no_grad()
def save_arrays(workload, path):
    """The images (NHWC) and the folded layers as float32 arrays, for a program without torch; returns the layers' specification."""
    arrays, specification = {"images": workload.x.permute(0, 2, 3, 1)}, []
    for i, (conv, bn, activation) in enumerate(layers(workload.network)):
        weight, bias = fold_batch_norm(conv, bn)
        arrays[f"weight{i}"], arrays[f"bias{i}"] = weight.permute(2, 3, 1, 0), bias  # HWIO
        specification.append({"stride": conv.stride[0], "padding": conv.padding[0], "groups": conv.groups, "activation": activation})
    arrays["fc_weight"], arrays["fc_bias"] = workload.network.fc.weight.t(), workload.network.fc.bias
    import numpy as np  # which whoever reads this with JAX has; torch itself does without

    np.savez(path, **{name: array.float().cpu().contiguous().numpy() for name, array in arrays.items()})
    return specification
