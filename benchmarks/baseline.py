"""The network as it was before this package: two Triton kernels through the JIT, everything else through PyTorch.

Pointwise convolution + batch norm + ReLU6 is a 128x128x32 matrix product (8 warps, 2 stages), used for the expand
convolutions of blocks 2 to 7; linear + bias is one of 32x64x32 (4 warps, 2 stages). One correction: pixels and channels
are read where they lie (channels_last), where the original took an NCHW tensor for a matrix of pixels by channels.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl


@triton.jit
def pointwise_bn_relu6_kernel(x, weight, bn_weight, bn_bias, bn_mean, bn_var, out, M, N, K, eps,
                              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(x + m[:, None] * K + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)
        b = tl.load(weight + n[None, :] * K + k[:, None], mask=(n[None, :] < N) & (k[:, None] < K), other=0.0)
        accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)
    scale = tl.load(bn_weight + n, mask=n < N, other=0.0).to(tl.float32)
    scale = scale / tl.sqrt(tl.load(bn_var + n, mask=n < N, other=1.0).to(tl.float32) + eps)
    shift = tl.load(bn_bias + n, mask=n < N, other=0.0).to(tl.float32)
    shift -= tl.load(bn_mean + n, mask=n < N, other=0.0).to(tl.float32) * scale
    y = tl.minimum(tl.maximum(accumulator * scale[None, :] + shift[None, :], 0.0), 6.0)
    tl.store(out + m[:, None] * N + n[None, :], y.to(out.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def linear_bias_kernel(x, weight, bias, out, M, N, K,
                       BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(x + m[:, None] * K + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)
        b = tl.load(weight + n[None, :] * K + k[:, None], mask=(n[None, :] < N) & (k[:, None] < K), other=0.0)
        accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)
    y = accumulator + tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(out + m[:, None] * N + n[None, :], y.to(out.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


def pointwise_bn_relu6(x, conv, bn):
    batch, channels, height, width = x.shape
    pixels, out_channels = batch * height * width, conv.out_channels
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty((batch, out_channels, height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    grid = (triton.cdiv(pixels, 128), triton.cdiv(out_channels, 128))
    pointwise_bn_relu6_kernel[grid](
        x, conv.weight, bn.weight, bn.bias, bn.running_mean, bn.running_var, out, pixels, out_channels, channels, bn.eps,
        BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, PRECISION="tf32" if torch.backends.cudnn.allow_tf32 else "ieee", num_warps=8, num_stages=2,
    )  # fmt: skip
    return out


def linear_bias(x, weight, bias):
    (rows, depth), columns = x.shape, weight.shape[0]
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    linear_bias_kernel[triton.cdiv(rows, 32), triton.cdiv(columns, 64)](
        x, weight, bias, out, rows, columns, depth,
        BLOCK_M=32, BLOCK_N=64, BLOCK_K=32, PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee", num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


def forward(network, x):
    """Logits of `network`, the plain torch.nn form with conv1, bn1, mbconv1..7 (sequences), conv2, bn2, fc, in eval mode."""
    x = F.relu(network.bn1(network.conv1(x.contiguous(memory_format=torch.channels_last))))
    x = network.mbconv1(x)
    for i in range(2, 8):
        expand, bn, _, *rest = getattr(network, f"mbconv{i}")
        x = pointwise_bn_relu6(x, expand, bn)
        for layer in rest:
            x = layer(x)
    x = F.relu(network.bn2(network.conv2(x)))
    x = F.adaptive_avg_pool2d(x, 1).flatten(1)
    return linear_bias(x, network.fc.weight, network.fc.bias)
