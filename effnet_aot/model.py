"""The network: 3x3 stem, seven MBConv blocks without residuals, 1x1 head, global average pool, linear layer.

    block: [1x1 expand + BN + ReLU6] -> 3x3 depthwise + BN + ReLU6 -> 1x1 project + BN

It is the network of KernelBench level 3, problem 23, whose plain torch.nn form is reference_network(). ModelNew holds the
same parameters, initialised by the same random numbers, and takes that form's state_dict as well as its own.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .fold import Folded, FoldedModule, bias_dtype, fold_batch_norm
from .ops import Network
from .ops.network import hold

# (in_channels, out_channels, stride, expand_ratio)
BLOCKS = [(32, 16, 1, 1), (16, 24, 2, 6), (24, 40, 2, 6), (40, 80, 2, 6), (80, 112, 1, 6), (112, 192, 2, 6), (192, 320, 1, 6)]


class FoldedBlock(NamedTuple):
    """A block's layers ready to run, and the window of its depthwise convolution."""

    expand: Folded | None
    depthwise: Folded
    project: Folded
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]


class FoldedNetwork:
    """The whole network ready to run: everything that inference reads besides the image.

    Handing over the weights one by one takes the host some 20 us a call. So the owner of one that is called often has the library
    hold them, for as long as this object lives. Then it can prepare them, too.
    """

    def __init__(self, weights, program):
        self.weights: tuple[torch.Tensor, ...] = weights
        self.program: tuple[int, ...] = program
        self._is_kept = False
        self._number = None  # by which the library knows it

    def keep(self):
        """The weights are there to stay."""
        self._is_kept = True

    def __call__(self, x):
        # Who looks at ops, or replaces tensors, is shown all of them.
        if type(x) is not torch.Tensor or torch._C._len_torch_dispatch_stack() or (self._number is None and not self._hold(x)):
            return torch.ops.effnet.network.default(x, self.weights, self.program)
        return torch.ops.effnet._held_network.default(x, self._number)

    def _hold(self, x):
        """Whether the library holds the weights now."""
        if not self._is_kept or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return False
        number = hold(self, self.weights, self.program)
        if x.is_cuda:
            torch.cuda.current_stream(x.device).synchronize()  # what was prepared serves calls on other streams, too
        self._number = number
        return True


class FusedMBConvBlock(FoldedModule):
    """An MBConv block: (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)), no residual.

    expand_ratio 1 has no expand convolution (expand_conv and expand_bn are None), unless unit_expand asks for it. The output
    has the input's memory format.
    """

    def __init__(self, in_channels, out_channels, stride, expand_ratio, *, unit_expand=False):
        super().__init__()
        hidden = round(in_channels * expand_ratio)
        has_expand = expand_ratio != 1 or unit_expand
        self.expand_conv = nn.Conv2d(in_channels, hidden, 1, bias=False) if has_expand else None
        self.expand_bn = nn.BatchNorm2d(hidden) if has_expand else None
        self.depthwise_conv = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.depthwise_bn = nn.BatchNorm2d(hidden)
        self.project_conv = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.project_bn = nn.BatchNorm2d(out_channels)

    def layers(self):
        expand = [(self.expand_conv, self.expand_bn)] if self.expand_conv is not None else []
        return [*expand, (self.depthwise_conv, self.depthwise_bn), (self.project_conv, self.project_bn)]

    def forward_modules(self, x):
        if self.expand_conv is not None:
            x = F.relu6(self.expand_bn(self.expand_conv(x)), inplace=True)
        x = F.relu6(self.depthwise_bn(self.depthwise_conv(x)), inplace=True)
        return self.project_bn(self.project_conv(x))

    def forward_batch_norm(self, x):
        ops = torch.ops.effnet
        if self.expand_conv is not None:
            x = ops.pointwise_bn_relu6(x, self.expand_conv.weight, *statistics(self.expand_bn))
        x = ops.depthwise_bn_relu6(x, self.depthwise_conv.weight, *statistics(self.depthwise_bn), *window(self.depthwise_conv))
        return ops.pointwise_bn(x, self.project_conv.weight, *statistics(self.project_bn))

    def fold(self, dtype=None):
        folded = [fold_batch_norm(conv, bn, dtype) for conv, bn in self.layers()]
        return FoldedBlock(folded[0] if len(folded) == 3 else None, *folded[-2:], *window(self.depthwise_conv))

    def forward_folded(self, x, folded):
        expand = folded.expand or (None, None)
        window = folded.stride, folded.padding
        return torch.ops.effnet.mbconv.default(x, *expand, *folded.depthwise, *folded.project, None, *window, "relu6")

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Also takes the plain layout, an nn.Sequential of conv, bn, relu6, conv, bn, relu6, conv, bn."""
        names = ["expand_conv", "expand_bn", None, "depthwise_conv", "depthwise_bn", None, "project_conv", "project_bn"]
        if f"{prefix}6.weight" not in state_dict:
            names = names[3:]
        for index, name in enumerate(names):
            rename(state_dict, f"{prefix}{index}.", f"{prefix}{name}.")
        super()._load_from_state_dict(state_dict, prefix, *args)


class ModelNew(FoldedModule):
    """Logits (N, num_classes) of images (N, 3, H, W), any batch, height and width.

    num_classes:  outputs of the linear layer.
    unit_expand:  gives block 1, whose expand ratio is 1, the 1x1 convolution that the benchmark's network has there and
                  EfficientNet has not.
    """

    def __init__(self, num_classes=1000, *, unit_expand=False):
        super().__init__()
        # In the reference's order, so that one seed gives both the same parameters.
        self.conv1 = nn.Conv2d(3, 32, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        for i, block in enumerate(BLOCKS, 1):
            setattr(self, f"mbconv{i}", FusedMBConvBlock(*block, unit_expand=unit_expand))
        self.conv2 = nn.Conv2d(320, 1280, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1280)
        fc = nn.Linear(1280, num_classes)
        self.fc_weight, self.fc_bias = fc.weight, fc.bias

    @classmethod
    def from_reference(cls, model):
        """A ModelNew with copies of another network's parameters, statistics, dtypes, devices and mode.

        model: a ModelNew or a network of reference_network()'s layout, with or without the expand convolution of block 1.
        """
        state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        fc = state.get("fc.weight", state.get("fc_weight"))
        if fc is None:
            raise ValueError(f"a network with fc.weight or fc_weight is needed, got {type(model).__name__} with {', '.join(list(state)[:3])}, ...")
        has_expand = "mbconv1.6.weight" in state or "mbconv1.expand_conv.weight" in state
        with torch.device("meta"):  # draws no random numbers
            new = cls(fc.shape[0], unit_expand=has_expand)
        new.load_state_dict(state, assign=True)
        for ours, theirs in zip(batch_norms(new), batch_norms(model), strict=True):
            ours.eps, ours.momentum = theirs.eps, theirs.momentum
        return new.train(model.training)

    @property
    def blocks(self):
        return [self.mbconv1, self.mbconv2, self.mbconv3, self.mbconv4, self.mbconv5, self.mbconv6, self.mbconv7]

    def layers(self):
        blocks = [layer for block in self.blocks for layer in block.layers()]
        return [(self.conv1, self.bn1), *blocks, (self.conv2, self.bn2)]

    def forward_modules(self, x):
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        for block in self.blocks:
            x = block(x)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return F.linear(x, self.fc_weight, self.fc_bias)

    def forward_batch_norm(self, x):
        ops = torch.ops.effnet
        x = ops.conv_bn_relu(x, self.conv1.weight, *statistics(self.bn1), *window(self.conv1))
        for block in self.blocks:
            x = block.forward_batch_norm(x)
        x = ops.pointwise_bn_relu_pool(x, self.conv2.weight, *statistics(self.bn2))
        return ops.linear_bias(x, self.fc_weight, self.fc_bias)

    def fold(self, dtype=None):
        network = Network()
        stride, padding = window(self.conv1)
        stem, head = fold_batch_norm(self.conv1, self.bn1, dtype), fold_batch_norm(self.conv2, self.bn2, dtype)
        # Whatever format the images come in, the kernels between stem and head are at their best in channels_last.
        first, *others = self.blocks
        if first.expand_conv is None:
            folded = first.fold(dtype)
            weights = {f"{name}_{part}": tensor for name, layer in (("stem", stem), ("depthwise", folded.depthwise), ("project", folded.project)) for part, tensor in layer._asdict().items()}
            y = network.add("stem_mbconv", **weights, stem_activation="relu", stem_stride=stride, stem_padding=padding,
                            activation="relu6", stride=folded.stride, padding=folded.padding, memory_format=torch.channels_last)  # fmt: skip
        else:
            y = network.add("conv", **stem._asdict(), activation="relu", stride=stride, padding=padding, memory_format=torch.channels_last)
            others = self.blocks
        for block in others:
            folded = block.fold(dtype)
            layers = {"expand": folded.expand, "depthwise": folded.depthwise, "project": folded.project}
            weights = {f"{name}_{part}": tensor for name, layer in layers.items() if layer for part, tensor in layer._asdict().items()}
            y = network.add("mbconv", y, **weights, activation="relu6", stride=folded.stride, padding=folded.padding)
        y = network.add("pointwise_pool", y, **head._asdict(), activation="relu")
        weight, bias = self.fc_weight.detach(), self.fc_bias.detach()  # a bias of the weight's dtype serves as well
        fc = Folded(weight, bias) if dtype is None else Folded(weight.to(dtype), bias.to(bias_dtype(dtype)))
        network.add("linear", y, **fc._asdict())
        return FoldedNetwork(tuple(network.weights), network.numbers)

    def forward_folded(self, x, folded):
        return folded(x)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        rename(state_dict, f"{prefix}fc.", f"{prefix}fc_")
        super()._load_from_state_dict(state_dict, prefix, *args)


def statistics(bn):
    """A batch norm as the arguments that the ops take."""
    return bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps


def window(conv):
    """A convolution's stride and its padding as (left, right, top, bottom)."""
    vertical, horizontal = conv.padding
    return conv.stride, (horizontal, horizontal, vertical, vertical)


def rename(state_dict, old, new):
    for name in [name for name in state_dict if name.startswith(old)]:
        state_dict[new + name.removeprefix(old)] = state_dict.pop(name)


def reference_network(num_classes=1000, unit_expand=False):
    """The same network in plain torch.nn, in the layout of KernelBench level 3, problem 23 (which has unit_expand)."""
    return ReferenceNetwork(num_classes, unit_expand)


class ReferenceNetwork(nn.Module):
    def __init__(self, num_classes, unit_expand):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        for i, block in enumerate(BLOCKS, 1):
            setattr(self, f"mbconv{i}", reference_block(*block, unit_expand=unit_expand))
        self.conv2 = nn.Conv2d(320, 1280, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1280)
        self.fc = nn.Linear(1280, num_classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        for i in range(1, 8):
            x = getattr(self, f"mbconv{i}")(x)
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.adaptive_avg_pool2d(x, (1, 1)).flatten(1)
        return self.fc(x)


def reference_block(in_channels, out_channels, stride, expand_ratio, *, unit_expand=False):
    """FusedMBConvBlock in plain torch.nn."""
    hidden = round(in_channels * expand_ratio)
    expand = []
    if expand_ratio != 1 or unit_expand:
        expand = [nn.Conv2d(in_channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)]
    return nn.Sequential(
        *expand,
        nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
        nn.BatchNorm2d(hidden),
        nn.ReLU6(inplace=True),
        nn.Conv2d(hidden, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels),
    )


def batch_norms(model):
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@torch.no_grad()
def calibrate_batch_norm(model, x):
    """Sets every batch norm's running statistics to those of the batch x: one pass in training mode. Returns the model.

    Without it a freshly initialised network in eval mode shrinks the signal layer by layer until its logits are the linear
    layer's bias, and every comparison of two implementations passes.
    """
    modes = [(module, module.training) for module in model.modules()]
    momenta = [(bn, bn.momentum) for bn in batch_norms(model)]
    for bn, _ in momenta:
        bn.reset_running_stats()
        bn.momentum = None  # a plain average, of this one batch
    model.train()
    model(x)
    for bn, momentum in momenta:
        bn.momentum = momentum
    for module, training in modes:
        module.training = training
    return model
