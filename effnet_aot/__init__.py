"""EfficientNet-style convolution blocks as kernels that are compiled ahead of time, registered as torch.ops.effnet.*."""

import importlib

from . import _library, ops
from .ops import linear_bias as fused_linear_bias
from .ops import pointwise_bn_relu6 as fused_pointwise_conv_bn_relu6

__version__ = "0.1.0"

# For CMake's find_package(effnet_aot CONFIG).
cmake_prefix_path: str = __path__[0]

# Resolved at first use, which keeps `import effnet_aot` cheap.
_LAZY = {
    **dict.fromkeys(["FusedMBConvBlock", "ModelNew"], "model"),
    **dict.fromkeys(["ConversionError", "convert", "explain"], "conversion"),
    **dict.fromkeys(["build_info", "kernels", "preload"], "_C"),
    "graphed": "cuda_graph",
}

__all__ = [
    "ConversionError",
    "FusedMBConvBlock",
    "ModelNew",
    "build_info",
    "cmake_prefix_path",
    "convert",
    "explain",
    "fused_linear_bias",
    "fused_pointwise_conv_bn_relu6",
    "graphed",
    "kernels",
    "ops",
    "preload",
]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _LAZY[name]
    if module == "_C":
        _library.require()
        try:
            value = getattr(importlib.import_module("._C", __name__), name)
        except ImportError as e:
            _library.explain(e)
    else:
        value = getattr(importlib.import_module(f".{module}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_LAZY})
