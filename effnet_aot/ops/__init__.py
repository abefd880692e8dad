"""A typed wrapper for every op of torch.ops.effnet.

Common to all of them:

* `x`, `weight` and `residual` share one dtype: float16, bfloat16 or float32, on the CPU also float64. Vectors (batch
  norm, bias) have that dtype or float32, the four of a batch norm all the same.
* Images are (N, C, H, W), contiguous or channels_last, and the result has the input's format; a tensor that is neither
  is copied to one first. N may be 0.
* `padding` is (left, right, top, bottom), as in torch.nn.functional.pad, or one number for all four sides.
* NaN and infinity propagate as in the torch.nn.functional composition that the formula names.
* Wrong arguments raise RuntimeError "effnet::<op>: <what was expected>, got <what came>".
* All are differentiable in every tensor argument. Under autocast x, weights and residual are cast, vectors are not.

fold_batch_norm() makes the weight and bias that the ops without batch norm take, and has its weight's dtype where they have x's.
"""

from .conv import conv, conv_bn_relu
from .depthwise import depthwise, depthwise_bn_relu6
from .expand_depthwise import expand_depthwise
from .fold_batch_norm import fold_batch_norm
from .linear import linear, linear_bias
from .mbconv import mbconv, taps_first
from .network import Network, Program, network
from .pointwise import pointwise, pointwise_bn, pointwise_bn_relu, pointwise_bn_relu6
from .pointwise_pool import pointwise_bn_relu_pool, pointwise_pool
from .stem_mbconv import stem_mbconv

__all__ = [
    "Network",
    "Program",
    "conv",
    "conv_bn_relu",
    "depthwise",
    "depthwise_bn_relu6",
    "expand_depthwise",
    "fold_batch_norm",
    "linear",
    "linear_bias",
    "mbconv",
    "network",
    "pointwise",
    "pointwise_bn",
    "pointwise_bn_relu",
    "pointwise_bn_relu6",
    "pointwise_bn_relu_pool",
    "pointwise_pool",
    "stem_mbconv",
    "taps_first",
]
