import torch
import torch.nn as nn
import triton
import triton.language as tl


# Every convolution has batch norm folded into its weight and bias; low and high clamp: none, ReLU, ReLU6.
# Maps between the layers are channels_last: rows of pixels by channels.


@triton.jit
def rounded(tile, PRECISION: tl.constexpr):
    # Tensor cores cut a float32 to TF32; rounding it first halves the error.
    if PRECISION == "tf32" and tile.dtype == tl.float32:
        return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [tile], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tile


@triton.jit
def activate(y, low, high):
    # NaN stays NaN, as in PyTorch.
    y = tl.maximum(y, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(y, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def matrix_product(x, weight, m, n, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                   PRECISION: tl.constexpr):
    # A (BLOCK_M, BLOCK_N) tile of x @ weight^T, both row-major.
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(x + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        b = tl.load(weight + n[None, :] * K + k[:, None], mask=(n < N)[None, :] & (k < K)[:, None], other=0.0)
        accumulator = tl.dot(rounded(a, PRECISION), rounded(b, PRECISION), accumulator, input_precision=PRECISION)
    return accumulator


@triton.jit
def pointwise_kernel(x, weight, bias, out, M, N, K, low, high,
                     BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    # 1x1 convolution over M pixels, or a linear layer over M rows.
    tiles = tl.cdiv(N, BLOCK_N)
    m = (tl.program_id(0) // tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    y = matrix_product(x, weight, m, n, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    y = activate(y + tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :], low, high)
    tl.store(out + m[:, None] * N + n[None, :], y.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def pointwise_pool_kernel(x, weight, bias, out, P, N, K, low, high,
                          BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    # 1x1 convolution and the mean over an image's P pixels: the map never leaves the registers.
    tiles = tl.cdiv(N, BLOCK_N)
    image = tl.program_id(0) // tiles
    n = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, P, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        y = matrix_product(x + image * P * K, weight, m, n, P, N, K, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
        total += tl.where((m < P)[:, None], activate(y + b[None, :], low, high), 0.0)
    tl.store(out + image * N + n, (tl.sum(total, axis=0) / P).to(out.dtype.element_ty), mask=n < N)


@triton.jit
def depthwise_kernel(x, weight, bias, out, batch, C, H, W, out_H, out_W, stride, low, high,
                     BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    # 3x3 with one pixel of zeros around the map. weight is (9, C).
    tiles = tl.cdiv(C, BLOCK_C)
    p = (tl.program_id(0) // tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = (tl.program_id(0) % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    image = p // (out_H * out_W)
    top = (p // out_W % out_H) * stride - 1
    left = (p % out_W) * stride - 1
    accumulator = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for tap in tl.static_range(9):
        y = top + tap // 3
        z = left + tap % 3
        inside = (image < batch) & (y >= 0) & (y < H) & (z >= 0) & (z < W)
        value = tl.load(x + ((image * H + y) * W + z)[:, None] * C + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0)
        accumulator += value.to(tl.float32) * tl.load(weight + tap * C + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    y = activate(accumulator + tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :], low, high)
    tl.store(out + p[:, None] * C + c[None, :], y.to(out.dtype.element_ty), mask=(image < batch)[:, None] & (c < C)[None, :])


@triton.jit
def stem_kernel(x, weight, bias, out, H, W, out_H, out_W, x_image, x_channel, x_row, x_column, low, high,
                N: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr):
    # 3x3 convolution of stride 2 on three channels, with one pixel of zeros around: 27 products, padded to 32 for the
    # tensor cores. Reads the picture through its strides and writes channels_last. weight is (N, 27).
    tiles = tl.cdiv(out_H * out_W, BLOCK_M)
    image = tl.program_id(0) // tiles
    p = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, N)
    k = tl.arange(0, 32)
    in_p = p < out_H * out_W
    y = (p // out_W * 2 - 1)[None, :] + (k // 3 % 3)[:, None]
    z = (p % out_W * 2 - 1)[None, :] + (k % 3)[:, None]
    inside = (k < 27)[:, None] & in_p[None, :] & (y >= 0) & (y < H) & (z >= 0) & (z < W)
    a = tl.load(weight + n[:, None] * 27 + k[None, :], mask=(k < 27)[None, :], other=0.0)
    b = tl.load(x + image * x_image + (k // 9 * x_channel)[:, None] + y * x_row + z * x_column, mask=inside, other=0.0)
    result = tl.dot(rounded(a, PRECISION), rounded(b, PRECISION), input_precision=PRECISION)
    result = activate(result + tl.load(bias + n).to(tl.float32)[:, None], low, high)
    where = (image * out_H * out_W + p)[None, :] * N + n[:, None]
    tl.store(out + where, result.to(out.dtype.element_ty), mask=in_p[None, :])


def precision(allow_tf32):
    return "tf32" if allow_tf32 else "ieee"


def images(x, channels, height, width):
    return torch.empty((x.shape[0], channels, height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def matmul_tile(x, rows, columns, depth):
    # Narrow and deep where few rows leave most of the GPU idle.
    if x.dtype == torch.float32:
        block_k = 16 if not torch.backends.cudnn.allow_tf32 else 32
        return (16, 32, block_k) if rows * columns < 2**19 else (64, 64, block_k)
    block_k = 64 if depth > 64 else 32
    return (16, 32, block_k) if rows * columns < 2**18 else (32, 32, block_k) if rows * columns < 2**20 else (64, 64, 32)


def pointwise(x, weight, bias, low, high):
    pixels, columns, depth = x.shape[0] * x.shape[2] * x.shape[3], weight.shape[0], weight.shape[1]
    out = images(x, columns, x.shape[2], x.shape[3])
    m, n, k = matmul_tile(x, pixels, columns, depth)
    pointwise_kernel[(triton.cdiv(pixels, m) * triton.cdiv(columns, n),)](
        x, weight, bias, out, pixels, columns, depth, low, high,
        BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, PRECISION=precision(torch.backends.cudnn.allow_tf32), num_warps=4, num_stages=3,
    )
    return out


def pointwise_pool(x, weight, bias, low, high):
    columns, depth = weight.shape[0], weight.shape[1]
    out = torch.empty((x.shape[0], columns), dtype=x.dtype, device=x.device)
    allow_tf32 = torch.backends.cudnn.allow_tf32
    k = 64 if x.dtype != torch.float32 else 32 if allow_tf32 else 16
    pointwise_pool_kernel[(x.shape[0] * triton.cdiv(columns, 32),)](
        x, weight, bias, out, x.shape[2] * x.shape[3], columns, depth, low, high,
        BLOCK_M=64, BLOCK_N=32, BLOCK_K=k, PRECISION=precision(allow_tf32), num_warps=4, num_stages=2,
    )
    return out


def depthwise(x, weight, bias, stride, low, high):
    batch, channels, height, width = x.shape
    out = images(x, channels, (height - 1) // stride + 1, (width - 1) // stride + 1)
    pixels = batch * out.shape[2] * out.shape[3]
    depthwise_kernel[(triton.cdiv(pixels, 32) * triton.cdiv(channels, 32),)](
        x, weight, bias, out, batch, channels, height, width, out.shape[2], out.shape[3], stride, low, high,
        BLOCK_P=32, BLOCK_C=32, num_warps=4,
    )
    return out


def stem(x, weight, bias, low, high):
    height, width = x.shape[2:]
    out = images(x, weight.shape[0], (height - 1) // 2 + 1, (width - 1) // 2 + 1)
    stem_kernel[(x.shape[0] * triton.cdiv(out.shape[2] * out.shape[3], 64),)](
        x, weight, bias, out, height, width, out.shape[2], out.shape[3], *x.stride(), low, high,
        N=weight.shape[0], BLOCK_M=64, num_warps=4,
        # So little arithmetic that TF32 need not cost accuracy: three products instead of one.
        PRECISION="tf32x3" if torch.backends.cudnn.allow_tf32 and x.dtype == torch.float32 else "ieee",
    )
    return out


def linear(x, weight, bias):
    (rows, depth), columns = x.shape, weight.shape[0]
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    k = 128 if x.dtype != torch.float32 else 64 if torch.backends.cuda.matmul.allow_tf32 else 16
    pointwise_kernel[(triton.cdiv(rows, 16) * triton.cdiv(columns, 16),)](
        x, weight, bias, out, rows, columns, depth, float("-inf"), float("inf"),
        BLOCK_M=16, BLOCK_N=16, BLOCK_K=k, PRECISION=precision(torch.backends.cuda.matmul.allow_tf32), num_warps=4, num_stages=3,
    )
    return out


def fold(conv, bn):
    scale = bn.weight.double() * (bn.running_var.double() + bn.eps).rsqrt()
    weight = (conv.weight.double() * scale.view(-1, 1, 1, 1)).flatten(1).to(conv.weight.dtype)
    if conv.groups > 1:
        weight = weight.t()
    return weight.contiguous(), (bn.bias.double() - bn.running_mean.double() * scale).float()


class ModelNew(nn.Module):
    def __init__(self, num_classes=1000, unit_expand=False):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        blocks = [(32, 16, 1, 1), (16, 24, 2, 6), (24, 40, 2, 6), (40, 80, 2, 6), (80, 112, 1, 6), (112, 192, 2, 6), (192, 320, 1, 6)]
        for i, (inputs, outputs, stride, ratio) in enumerate(blocks, 1):
            hidden = inputs * ratio
            block = nn.ModuleDict()
            if ratio != 1 or unit_expand:
                block["expand_conv"] = nn.Conv2d(inputs, hidden, 1, bias=False)
                block["expand_bn"] = nn.BatchNorm2d(hidden)
            block["depthwise_conv"] = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
            block["depthwise_bn"] = nn.BatchNorm2d(hidden)
            block["project_conv"] = nn.Conv2d(hidden, outputs, 1, bias=False)
            block["project_bn"] = nn.BatchNorm2d(outputs)
            setattr(self, f"mbconv{i}", block)
        self.conv2 = nn.Conv2d(320, 1280, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1280)
        fc = nn.Linear(1280, num_classes)
        self.fc_weight, self.fc_bias = fc.weight, fc.bias
        self.folded, self.folded_from = None, None

    def layers(self):
        # (convolution, batch norm, upper bound of its ReLU or None)
        yield self.conv1, self.bn1, float("inf")
        for i in range(1, 8):
            block = getattr(self, f"mbconv{i}")
            if "expand_conv" in block:
                yield block["expand_conv"], block["expand_bn"], 6.0
            yield block["depthwise_conv"], block["depthwise_bn"], 6.0
            yield block["project_conv"], block["project_bn"], None
        yield self.conv2, self.bn2, float("inf")

    def folded_layers(self):
        # The folded layers, computed anew when a parameter or statistic was replaced or changed in place.
        tensors = [t for t in (*self.parameters(), *self.buffers()) if t.is_floating_point()]
        state = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
        if self.folded is None or self.folded_from != state:
            self.folded = []
            for conv, bn, high in self.layers():
                low = float("-inf") if high is None else 0.0
                self.folded.append((conv, *fold(conv, bn), low, float("inf") if high is None else high))
            self.folded_from = state
        return self.folded

    def train(self, mode=True):
        self.folded = None
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self.folded = None
        return super()._apply(fn, recurse)

    def forward_torch(self, x):
        for conv, bn, high in self.layers():
            x = bn(conv(x))
            x = x if high is None else x.clamp(0.0, high)
        return nn.functional.linear(x.mean((2, 3)), self.fc_weight, self.fc_bias)

    def forward(self, x):
        # Batch statistics in training mode, and gradients, are PyTorch's own.
        if self.training or (torch.is_grad_enabled() and (x.requires_grad or self.fc_weight.requires_grad)):
            return self.forward_torch(x)
        with torch.no_grad():
            (_, *first), *middle, (_, *last) = self.folded_layers()
            x = stem(x, *first)
            for conv, weight, bias, low, high in middle:
                if conv.groups > 1:
                    x = depthwise(x, weight, bias, conv.stride[0], low, high)
                else:
                    x = pointwise(x, weight, bias, low, high)
            return linear(pointwise_pool(x, *last), self.fc_weight, self.fc_bias)
