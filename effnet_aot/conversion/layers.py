"""The layers of a converted network, one for each op with folded batch norm. Weights are frozen."""

import re

import torch
from torch import Tensor, nn

from ..ops import Program

# The overloads themselves: Converted.forward has passed the autograd key already, for all of its layers.
ops = torch.ops.effnet


class ExactBiases(nn.Module):
    """Biases stay float32 where .half(), .bfloat16() or .to(dtype) makes the weights half as wide: the kernels add them in
    float32, and those that networks run on take no others."""

    def _apply(self, fn, recurse=True):
        before = {name: parameter.data for name, parameter in self._parameters.items() if parameter is not None and name.endswith("bias")}
        super()._apply(fn, recurse)
        for name, exact in before.items():
            bias = self._parameters[name]
            if bias.dtype in (torch.float16, torch.bfloat16):
                bias.data = exact.to(bias.device)
        return self


class Layer(ExactBiases):
    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = "none"):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.activation = activation

    def fields(self) -> dict:
        """The layer as a step of a program, but for where it reads."""
        fields = {"weight": self.weight, "bias": self.bias, "activation": self.activation}
        return {name: value for name, value in fields.items() if value is not None}

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

    def fields(self):
        return super().fields() | {"stride": self.stride, "padding": self.padding}

    def sizes(self):
        return [*super().sizes(), f"kernel={tuple(self.weight.shape[2:])}", f"stride={self.stride}", f"padding={self.padding}"]


class Conv(WindowLayer):
    """The stem: whatever format the image comes in, the maps of the network are channels_last."""

    def fields(self):
        return super().fields() | {"memory_format": torch.channels_last}

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
    def fields(self):
        return {name: value for name, value in super().fields().items() if name != "activation"}

    def forward(self, x):
        return ops.linear.default(x, self.weight, self.bias)


class Chain(ExactBiases):
    """Several layers in one call: a program over parameters that are called after the layers, "features_0_0_weight"."""

    def __init__(self, program: Program, weights: dict[str, Tensor]):
        super().__init__()
        for name, weight in weights.items():
            self.register_parameter(name, nn.Parameter(weight, requires_grad=False))
        self.program = program.numbers

    def extra_repr(self) -> str:
        return re.sub(r"\bw(\d+)\b", lambda match: list(self._parameters)[int(match[1])], str(Program.parse(self.program, len(self._parameters))))

    def forward(self, x):
        return ops.network.default(x, list(self._parameters.values()), self.program)
