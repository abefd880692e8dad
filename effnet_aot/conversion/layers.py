"""The layers of a converted network, one for each op with folded batch norm. Weights are frozen."""

import torch
from torch import Tensor, nn

# The overloads themselves: Converted.forward has passed the autograd key already, for all of its layers.
ops = torch.ops.effnet


class Layer(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = "none"):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.activation = activation

    def extra_repr(self) -> str:
        parts = [*self.sizes(), self.activation if self.activation != "none" else "", "bias=False" if self.bias is None else ""]
        return ", ".join(filter(None, parts))

    def sizes(self) -> list[str]:
        return [f"{self.weight.shape[1]}, {self.weight.shape[0]}"]


class WindowLayer(Layer):
    """stride: (vertical, horizontal); padding: (left, right, top, bottom)."""

    def __init__(self, weight, bias, stride: tuple[int, int], padding: tuple[int, int, int, int], activation: str):
        super().__init__(weight, bias, activation)
        self.stride = stride
        self.padding = padding

    def sizes(self):
        return [*super().sizes(), f"kernel={tuple(self.weight.shape[2:])}", f"stride={self.stride}", f"padding={self.padding}"]


class Conv(WindowLayer):
    """The stem: whatever format the image comes in, the maps of the network are channels_last."""

    def forward(self, x):
        return ops.conv.default(x, self.weight, self.bias, self.stride, self.padding, self.activation, torch.channels_last)


class Depthwise(WindowLayer):
    def sizes(self):
        return [str(self.weight.shape[0]), *super().sizes()[1:]]

    def forward(self, x):
        return ops.depthwise.default(x, self.weight, self.bias, self.stride, self.padding, self.activation)


class Pointwise(Layer):
    def forward(self, x, residual=None):
        return ops.pointwise.default(x, self.weight, self.bias, residual, self.activation)


class PointwisePool(Layer):
    """(N, C_in, H, W) -> (N, C_out)."""

    def forward(self, x):
        return ops.pointwise_pool.default(x, self.weight, self.bias, self.activation)


class Linear(Layer):
    def forward(self, x):
        return ops.linear.default(x, self.weight, self.bias)
