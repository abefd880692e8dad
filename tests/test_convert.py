"""convert(): stock networks, the spellings that the graph may have, what is refused, and what can be done with the result."""

import copy
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from inductor import skip_if_every_package_crashes
from networks import STOCK, AttentionNet, EfficientNetLike, ResNetLike, conv_bn, images, is_installed, stock, trained
from torch import nn

import effnet_aot
from effnet_aot import ConversionError, convert, explain
from effnet_aot.ops import Program
from effnet_aot.ops.network import Call, evaluate

gpu = pytest.mark.gpu


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def error(out, exact):
    return ((out.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()).item()


@torch.no_grad()
def assert_no_worse(converted, model, x):
    """The error against float64 is at most 1.25 times eager's in the same dtype. Eager has two errors, one for each layout,
    and which of them is the smaller is chance."""
    exact = copy.deepcopy(model).cpu().double()(x.cpu().double()).to(x.device)  # the package's ops know float64 on the CPU only
    eager = max(
        error(copy.deepcopy(model).to(memory_format=layout)(x.to(memory_format=layout)), exact)
        for layout in (torch.contiguous_format, torch.channels_last)
    )
    out = converted(x)
    assert out.dtype == x.dtype and out.shape == exact.shape
    assert error(out, exact) <= 1.25 * eager
    assert len(x) == 1 or exact.std(0).mean() > 0.1 * exact.std()  # the images make a difference


def assert_converted(converted):
    """Every call of the graph is one of this package's layers."""
    assert converted.report.complete and converted.report.share == 1
    for node in converted.network.graph.nodes:
        assert node.op in ("placeholder", "call_module", "output"), node.format_node()
    assert {type(layer).__module__ for layer in converted.network.modules() if not list(layer.children())} == {"effnet_aot.conversion.layers"}


# ---- stock networks ----

ON_CPU = [pytest.param(("cpu", torch.float32), name, id=f"cpu-float32-{name}") for name in STOCK]
ON_CPU.append(pytest.param(("cpu", torch.float16), "timm.tf_efficientnet_lite0", id="cpu-float16-timm.tf_efficientnet_lite0"))
ON_GPU = [
    pytest.param(("cuda", dtype), name, marks=gpu, id=f"cuda-{str(dtype).removeprefix('torch.')}-{name}")
    for dtype in (torch.float16, torch.float32) for name in STOCK
]  # fmt: skip


def network(name, device, dtype=torch.float32):
    if device == "cuda" and not is_installed(name):  # GPU machines may have no way to install it; CPU tests need it
        pytest.skip(f"the package of {name} is not installed")
    return stock(name).to(device, dtype)


@pytest.mark.parametrize("where, name", ON_CPU + ON_GPU)
def test_stock_network(where, name):
    device, dtype = where
    model = network(name, device, dtype)
    converted = convert(model, images(1, 3, 96, 96, device=device, dtype=dtype))
    assert_converted(converted)
    # Two float32 errors of a network as deep as these differ by chance until many outputs are averaged: on a CPU one image can
    # have two thirds of the sum of squares.
    assert_no_worse(converted, model, images(64 if device == "cpu" else 16, 3, 96, 96, device=device, dtype=dtype))
    with torch.no_grad():
        alone = converted(images(4, 3, 96, 96, device=device, dtype=dtype)[2:3])
        assert converted(images(0, 3, 96, 96, device=device, dtype=dtype)).shape == (0, *alone.shape[1:])


@pytest.mark.parametrize(
    "name, height, width",
    [
        ("torchvision.mobilenet_v2", 225, 225),
        ("timm.tf_efficientnet_lite0", 225, 225),
        ("timm.tf_efficientnet_lite0", 161, 97),
        ("efficientnet_lite_pytorch", 161, 97),
        ("reference_network", 161, 97),
    ],
)
def test_odd_size(device, name, height, width):
    model = network(name, device)
    converted = convert(model, images(1, 3, height, width, device=device))
    assert_converted(converted)
    assert_no_worse(converted, model, images(2, 3, height, width, device=device))


def test_what_becomes_of_mobilenet():
    converted = convert(stock("torchvision.mobilenet_v2"), images(2, 3, 64, 64))
    rows = converted.report.rows
    ops = [row.op for row in rows]
    assert {op: ops.count(op) for op in ops} == {"conv": 1, "depthwise": 17, "pointwise": 33, "pointwise_pool": 1, "identity": 1, "linear": 1}
    assert rows[0].path == "features.0.0" and rows[0].targets == ("conv2d", "batch_norm", "hardtanh")
    assert sum("add" in row.targets for row in rows if row.op == "pointwise") == 10
    assert rows[-3].targets == ("conv2d", "batch_norm", "hardtanh", "adaptive_avg_pool2d", "flatten")
    # 300.8 M at 224 x 224 are published, all but 0.13 M of the 1000 classes' layer in proportion to the pixels.
    assert sum(row.multiply_adds for row in rows) == pytest.approx(299.5e6 * (64 / 224) ** 2, rel=0.01)
    steps = Program.parse(converted.network.chain.program, len(list(converted.parameters()))).steps
    assert [step.kind for step in steps] == ["stem_mbconv", *["mbconv"] * 16, "pointwise_pool", "linear"]
    assert sum(step.fields.get("residual") is not None for step in steps) == 10
    assert converted.network.chain.features_1_conv_0_0_weight.shape == (32, 1, 3, 3)


# ---- spellings: small networks of 3 x 9 x 9 images ----


class Function(nn.Module):
    """function(self, x), with modules for it to call."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.function(self, x)


def activated(activation):
    return lambda: Function(lambda m, x: activation(m.conv(x)), conv=conv_bn(3, 8, 3, 2))


def windowed(*args, pad=(0, 0, 0, 0), **options):
    return lambda: nn.Sequential(conv_bn(3, 8, 1), nn.ZeroPad2d(pad), nn.Conv2d(8, 8, *args, groups=8, **options), nn.BatchNorm2d(8), nn.ReLU6())


def residual(add):
    return lambda: Function(lambda m, x: add(m.project(x := m.stem(x)), x), stem=conv_bn(3, 8, 3), project=conv_bn(8, 8, 1))


def pooled(pool):
    return lambda: Function(lambda m, x: pool(m.head(x)), head=nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()))


def classified(function, fc):
    return lambda: Function(lambda m, x: function(m.head(x).mean((2, 3)), m.fc), head=conv_bn(3, 8, 1), fc=fc)


SPELLINGS = {
    "bias": (["conv"], lambda: nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())),
    "bias and batch norm": (["conv"], lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))),
    "neither bias nor batch norm": (["pointwise"], lambda: nn.Conv2d(3, 8, 1, bias=False)),
    "batch norm without affine": (["pointwise"], lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, affine=False))),
    "batch norm with large eps": (["pointwise"], lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, eps=0.5))),
    "two batch norms": (["pointwise"], lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.BatchNorm2d(8))),
    "identity and dropout": (["pointwise"], lambda: nn.Sequential(nn.Identity(), nn.Conv2d(3, 8, 1), nn.Dropout(), nn.Dropout2d(inplace=True), nn.ReLU())),
    "nn.ReLU6": (["conv"], activated(nn.ReLU6())),
    "nn.ReLU6 in place": (["conv"], activated(nn.ReLU6(inplace=True))),
    "nn.ReLU in place": (["conv"], activated(nn.ReLU(inplace=True))),
    "F.relu6": (["conv"], activated(F.relu6)),
    "torch.relu_": (["conv"], activated(torch.relu_)),
    "hardtanh": (["conv"], activated(nn.Hardtanh(0, 6))),
    "clamp to 6": (["conv"], activated(lambda x: x.clamp(0, 6))),
    "clamp from 0": (["conv"], activated(lambda x: x.clamp(min=0))),
    "clamp_min_": (["conv"], activated(lambda x: x.clamp_min_(0.0))),
    "asymmetric pad": (["pointwise", "depthwise"], windowed(3, 2, pad=(0, 1, 2, 1))),
    "pad and padding": (["pointwise", "depthwise"], windowed(3, padding=1, pad=(0, 1, 0, 1))),
    "pad of nothing": (["pointwise", "depthwise"], windowed(3)),
    "padding same": (["pointwise", "depthwise"], windowed(5, padding="same")),
    "padding valid": (["pointwise", "depthwise"], windowed(5, padding="valid")),
    "depthwise 5x5 with stride": (["pointwise", "depthwise"], windowed(5, 2, 2)),
    "two strides": (["pointwise", "depthwise"], windowed(3, (1, 2), (0, 1))),
    "padding same, even kernel": (["conv"], lambda: nn.Conv2d(3, 8, (2, 4), padding="same")),
    "pad in width only": (["conv"], lambda: Function(lambda m, x: m.conv(F.pad(x, (1, 2))), conv=nn.Conv2d(3, 8, 3))),
    "two pads": (["conv"], lambda: nn.Sequential(nn.ZeroPad2d(1), nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 8, 3, 2))),
    "pad for two": (
        ["conv", "conv"],
        lambda: Function(lambda m, x: (m.a(x := F.pad(x, (1, 1, 1, 1))), m.b(x)), a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(3, 8, 5)),
    ),
    "1x1 with stride": (["conv"], lambda: nn.Conv2d(3, 8, 1, 2)),
    "conv + x": (["conv", "pointwise"], residual(lambda y, x: y + x)),
    "x + conv": (["conv", "pointwise"], residual(lambda y, x: x + y)),
    "conv += x": (["conv", "pointwise"], residual(lambda y, x: y.add_(x))),
    "x += conv": (["conv", "pointwise"], residual(lambda y, x: x.add_(y))),
    "relu(conv + x)": (["conv", "pointwise"], residual(lambda y, x: F.relu(y + x))),
    "conv + conv": (["pointwise", "pointwise"], lambda: Function(lambda m, x: F.relu(m.a(x) + m.b(x)), a=conv_bn(3, 8, 1), b=conv_bn(3, 8, 1))),
    "adaptive pool, flatten": (["pointwise_pool"], pooled(lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1))),
    "adaptive pool, view": (["pointwise_pool"], pooled(lambda x: F.adaptive_avg_pool2d(x, (1, 1)).view(x.size(0), -1))),
    "adaptive pool, reshape": (["pointwise_pool"], pooled(lambda x: F.adaptive_avg_pool2d(x, 1).reshape(-1, 8))),
    "adaptive pool, two squeezes": (["pointwise_pool"], pooled(lambda x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1))),
    "adaptive pool, dropout": (["pointwise_pool"], pooled(lambda x: F.dropout(F.adaptive_avg_pool2d(x, 1), 0.5, training=False).flatten(1))),
    "average pool of all": (["pointwise_pool"], pooled(lambda x: F.avg_pool2d(x, 9).flatten(1))),
    "mean": (["pointwise_pool"], pooled(lambda x: x.mean([2, 3]))),
    "mean of the last two": (["pointwise_pool"], pooled(lambda x: x.mean((-1, -2)))),
    "mean, keepdim": (["pointwise_pool"], pooled(lambda x: x.mean((2, 3), keepdim=True))),
    "linear": (["pointwise_pool", "linear"], classified(lambda x, fc: fc(x), nn.Linear(8, 5))),
    "linear without bias": (["pointwise_pool", "linear"], classified(lambda x, fc: fc(x), nn.Linear(8, 5, bias=False))),
    "linear and batch norm": (["pointwise_pool", "linear"], classified(lambda x, fc: fc(x), nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5)))),
    "matrix product": (["pointwise_pool", "linear"], classified(lambda x, fc: x @ fc.weight.t(), nn.Linear(8, 5))),
    "addmm": (["pointwise_pool", "linear"], classified(lambda x, fc: torch.addmm(fc.bias, x, fc.weight.t()), nn.Linear(8, 5))),
    "1x1 convolution as classifier": (["pointwise_pool", "pointwise"], classified(lambda x, fc: fc(x[:, :, None, None]).flatten(1), nn.Conv2d(8, 5, 1))),
    "weight norm": (["pointwise"], lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 1))),
    "full slice": (["pointwise"], lambda: Function(lambda m, x: F.relu(m.conv(x)[:, :]), conv=nn.Conv2d(3, 8, 1))),
    "called twice": (["pointwise"] * 2, lambda: Function(lambda m, x: m.conv(m.conv(x)), conv=nn.Conv2d(3, 3, 1))),
    "functions between modules": (["pointwise"] * 2, lambda: Function(lambda m, x: F.conv2d(m.conv(x), m.conv.weight), conv=nn.Conv2d(3, 3, 1))),
    "names that a graph module has": (["pointwise"] * 2, lambda: nn.Sequential(OrderedDict(graph=nn.Conv2d(3, 8, 1), code=nn.Conv2d(8, 8, 1)))),
    "structured output": (["conv", "pointwise"], residual(lambda y, x: {"sum": x + y, "parts": [x]})),
}
OPS = {"Conv": "conv", "Depthwise": "depthwise", "Pointwise": "pointwise", "PointwisePool": "pointwise_pool", "Linear": "linear"}


def ops(converted):
    """Of all layers, those of chains too."""
    called = []
    for node in converted.network.graph.nodes:
        if node.op == "call_module":
            layer = converted.network.get_submodule(node.target)
            if type(layer).__name__ == "Chain":
                called += [step.kind for step in Program.parse(layer.program, len(list(layer.parameters()))).steps]
            else:
                called.append(OPS[type(layer).__name__])
    return called


def small(build, device):
    """The network, and images for it: in float64 where that is possible, so that nothing else than rounding fits."""
    torch.manual_seed(0)
    x = images(4, 3, 9, 9, device=device, dtype=torch.float64 if device == "cpu" else torch.float32)
    return trained(build().to(x), x), x


def assert_same(actual, expected):
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}
    actual, expected = torch.utils._pytree.tree_flatten(actual), torch.utils._pytree.tree_flatten(expected)
    assert actual[1] == expected[1]
    for a, e in zip(actual[0], expected[0], strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance[e.dtype], atol=tolerance[e.dtype])


def exact(model, x):
    """What the model computes in float64, rounded to x's dtype: eager on a GPU may have coarser ways to compute float32."""
    return torch.utils._pytree.tree_map(lambda t: t.to(x.dtype), copy.deepcopy(model).double()(x.double()))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spelling(spelling, device):
    expected, build = SPELLINGS[spelling]
    model, x = small(build, device)
    converted = convert(model, x)
    assert ops(converted) == expected
    with torch.no_grad():
        assert_same(converted(x), exact(model, x))
        assert_same(converted(x[:1]), exact(model, x[:1]))


@pytest.mark.parametrize("build", [residual(lambda y, x: F.relu6(y + x)), classified(lambda x, fc: fc(x), nn.Linear(8, 5)), windowed(5, 2, pad=(1, 2, 1, 2))])
def test_decomposed(build):
    """The graph that torch.export's decompositions leave: convolution, _native_batch_norm_legit_no_training, addmm, ..."""
    model, x = small(build, "cpu")
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).run_decompositions()
    targets = {str(node.target) for node in program.graph.nodes}
    assert "aten.convolution.default" in targets and "aten.conv2d.default" not in targets
    converted = convert(program.module(), x)
    assert ops(converted) == ops(convert(model, x))
    with torch.no_grad():
        assert_same(converted(x), model(x))


def test_converted_again():
    model, x = small(residual(lambda y, x: F.relu6(y + x)), "cpu")
    once = convert(model, x)
    twice = convert(once, x)
    assert ops(twice) == ops(once)
    with torch.no_grad():
        assert torch.equal(twice(x), once(x))


def test_same_padding():
    """TensorFlow's: each side gets what the size asks for, which is why a converted network has one size."""

    def function(m, x):
        bottom, right = ((-(-size // 2) - 1) * 2 + 3 - size for size in x.shape[2:])
        return m.conv(F.pad(x, (right // 2, right - right // 2, bottom // 2, bottom - bottom // 2)))

    model = Function(function, conv=nn.Conv2d(3, 8, 3, 2)).eval()
    for height, width, padding in ((8, 8, (0, 1, 0, 1)), (9, 8, (0, 1, 1, 1)), (9, 9, (1, 1, 1, 1))):
        assert convert(model, images(1, 3, height, width)).network.conv.padding == padding


# ---- writes in place ----


def test_writes_through_a_view():
    def function(m, x):
        x = m.a(x)
        part = x[:, :4]
        part.mul_(2)  # changes x
        y = m.b(x)
        x.relu_()  # after b has read x
        return y + x

    model, x = small(lambda: Function(function, a=conv_bn(3, 8, 3), b=conv_bn(8, 8, 1)), "cpu")
    converted = convert(model, x, partial=True)
    with torch.no_grad():
        assert_same(converted(x), model(x))


def test_the_image_is_not_written_to():
    model, x = small(lambda: Function(lambda m, x: m.conv(x.relu_()), conv=nn.Conv2d(3, 8, 1)), "cpu")
    converted, before = convert(model, x, partial=True), x.clone()
    with torch.no_grad():
        out = converted(x)
        assert torch.equal(x, before)
        assert_same(out, model(x))


# ---- what does not map ----


@pytest.mark.parametrize(
    "build, unmapped, share",
    [
        (EfficientNetLike, {"silu": 5, "mean": 2, "sigmoid": 1, "mul": 1}, (1, 1)),
        (ResNetLike, {"max_pool2d": 1, "conv2d": 1, "batch_norm": 1, "relu": 1, "adaptive_avg_pool2d": 1}, (0.8, 0.85)),
        (AttentionNet, {"scaled_dot_product_attention": 1, "layer_norm": 1, "linear": 1, "add": 1, "mean": 1}, (0.05, 0.1)),
    ],
)
def test_partial(build, unmapped, share, device):
    torch.manual_seed(0)
    x = images(2, 3, 32, 32, device=device)
    model = trained(build().to(device), x)
    with pytest.raises(ConversionError) as e:
        convert(model, x)
    report = e.value.report
    found = [row.targets[0] for row in report.unmapped]
    assert unmapped.items() <= {name: found.count(name) for name in found}.items()
    for row in report.unmapped:
        line = next(line for line in str(e.value).splitlines() if line.split()[:1] == [row.nodes[0]])
        assert row.path in line and row.kind in line and row.reason and row.reason in line
    assert share[0] <= report.share <= share[1] and f"{report.share:.1%} of the multiply-adds" in str(e.value)

    converted = convert(model, x, partial=True)
    assert converted.report == report
    with torch.no_grad():
        for batch in (x, x[:1]):
            assert_same(converted(batch), exact(model, batch))
            assert_same(pickle.loads(pickle.dumps(converted))(batch), converted(batch))


def refusal(model, x):
    with pytest.raises(ConversionError) as e:
        convert(model, x)
    return str(e.value)


@pytest.mark.parametrize(
    "layer, reason",
    [
        (nn.Conv2d(32, 32, 3), "dense 3x3 with stride (1, 1) from 32 channels"),
        (nn.Conv2d(32, 64, 3, groups=32), "32 groups of 32 channels to 64"),
        (nn.Conv2d(32, 32, 7, groups=32), "depthwise 7x7"),
        (nn.Conv2d(32, 32, 3, 3, groups=32), "with stride (3, 3)"),
        (nn.Conv2d(32, 32, 3, dilation=2, groups=32), "dilation (2, 2)"),
        (nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect", groups=32), "is not in the vocabulary"),
        (nn.ConvTranspose2d(32, 32, 1), "is not in the vocabulary"),
        (nn.BatchNorm2d(32, track_running_stats=False), "normalises with the batch's own statistics"),
        (nn.Hardtanh(-1, 1), "is not in the vocabulary"),
        (nn.Hardswish(), "is not in the vocabulary"),
        (nn.Linear(9, 9), "a linear layer on 4 dimensions"),
        (nn.AdaptiveAvgPool2d(2), "is not in the vocabulary"),
        (nn.ConstantPad2d(1, 1.0), "is not in the vocabulary"),
    ],
    ids=str,
)
def test_what_is_refused(layer, reason):
    model = nn.Sequential(nn.Conv2d(3, 32, 1), layer).eval()
    assert reason in refusal(model, images(2, 3, 9, 9))
    converted = convert(model, images(2, 3, 9, 9), partial=True)
    assert not converted.report.complete and ops(converted)[0] == "pointwise"
    with torch.no_grad():
        assert_same(converted(images(3, 3, 9, 9)), model(images(3, 3, 9, 9)))


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.relu(y := m.conv(x)) + y,  # the result of the convolution is used twice
        lambda m, x: (y := m.conv(x)) + y,
        lambda m, x: m.conv(x) + m.norm.weight[:, None, None],  # broadcast
        lambda m, x: torch.add(m.conv(x), m.stem(x), alpha=2),
        lambda m, x: F.relu(m.conv(x)) + m.stem(x),  # the activation comes first
        lambda m, x: (m.conv(x) + m.stem(x)).mean((2, 3)),
        lambda m, x: m.conv(x).mean((2,)),
        lambda m, x: m.norm(F.relu(m.conv(x))),
        lambda m, x: F.conv2d(x, m.conv(x).mean((0, 2, 3)).reshape(1, 8, 1, 1)[:, :3]),  # the weight depends on the image
        lambda m, x: F.pad(m.conv(x), (1, 0, 1, 0)),
        lambda m, x: F.conv2d(F.pad(m.conv(x), (-1, 0, 0, 0)), m.stem[0].weight.repeat(1, 8, 1, 1)[:, :8]),  # the pad crops
    ],
)
def test_near_misses(function):
    model, x = small(lambda: Function(function, conv=conv_bn(3, 8, 1), stem=conv_bn(3, 8, 3), norm=nn.BatchNorm2d(8)), "cpu")
    refusal(model, x)
    with torch.no_grad():
        assert_same(convert(model, x, partial=True)(x), model(x))


def test_training_mode():
    model = stock("reference_network")
    x = images(2, 3, 64, 64)
    assert "ReferenceNetwork is in training mode" in refusal(model.train(), x)
    model.eval().bn2.train()
    message = refusal(model, x)
    assert "bn2.num_batches_tracked" in message and "training mode" in message


def test_what_cannot_be_traced():
    class BySum(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    class ByStride(nn.Module):
        def forward(self, x):
            return x.as_strided((3,), (1,))

    x = images(2, 3, 9, 9)
    assert "torch.export cannot trace BySum" in refusal(BySum().eval(), x)
    assert "as_strided" in refusal(ByStride().eval(), x)
    assert "must be a tensor (N, C, H, W), got (3, 9, 9)" in refusal(nn.Identity().eval(), x[0])
    assert "must be a tensor (N, C, H, W), got list" in refusal(nn.Identity().eval(), [x])


def test_limited_batches(device):
    """The model's own limits count. On a GPU torch.export also tells for how many images ATen would take cuDNN's batch norm."""
    class ByBatch(nn.Module):
        def forward(self, x):
            return x if x.shape[0] < 100 else -x

    model = nn.Sequential(conv_bn(3, 8, 3, 2), ByBatch()).eval().to(device)
    assert "batches outside of 2 to 99" in refusal(model, images(2, 3, 9, 9, device=device))
    convert(model[0], images(2, 3, 9, 9, device=device))


# ---- the result ----


@pytest.fixture(scope="module")
def pair():
    """A network with everything in it, and its conversion."""
    torch.manual_seed(0)
    x = images(4, 3, 33, 33)
    block = Function(lambda m, x: x + m.project(m.depthwise(m.expand(x))), expand=act(8, 24, 1), depthwise=act(24, 24, 5, groups=24), project=conv_bn(24, 8, 1))
    names = ["stem", "block", "head", "pool", "flatten", "dropout", "fc"]
    layers = [act(3, 8, 3, 2), block, act(8, 40, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(40, 7)]
    model = trained(nn.Sequential(OrderedDict(zip(names, layers))), x)
    return model, convert(model, x)


def act(*args, **options):
    return nn.Sequential(*conv_bn(*args, **options), nn.ReLU6(inplace=True))


def test_output_of_the_pair(pair):
    model, converted = pair
    assert ops(converted) == ["conv", "mbconv", "pointwise_pool", "linear"]
    assert isinstance(converted, nn.Module) and not converted.training
    assert_no_worse(converted, model, images(8, 3, 33, 33))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_dtypes(pair, half, device):
    """Converted in half precision or made so afterwards; biases are float32 both times, as the fastest kernels want them."""
    model = copy.deepcopy(pair[0]).to(device, half)
    x = images(8, 3, 33, 33, device=device, dtype=half)
    before = convert(model, x)
    after = copy.deepcopy(pair[1]).to(device, half)
    for converted in (before, after):
        assert {p.dtype for name, p in converted.named_parameters() if name.endswith("weight")} == {half}
        assert {p.dtype for name, p in converted.named_parameters() if name.endswith("bias")} == {torch.float32}
    biases = {name: p for name, p in pair[1].named_parameters() if name.endswith("bias")}
    assert biases and all(torch.equal(p, biases[name].to(device)) for name, p in after.named_parameters() if name.endswith("bias"))
    # In so small a network the rounding of the folded weights counts for more than that of the maps.
    with torch.no_grad():
        for converted, parameters in ((before, model), (after, copy.deepcopy(pair[0]).to(device))):
            exact = copy.deepcopy(parameters).double()(x.double())
            assert error(converted(x), exact) <= 3 * error(model(x), exact)
    assert_no_worse(convert(model.float(), x.float()), model, x.float())


def test_half(pair):
    converted = copy.deepcopy(pair[1]).half()
    assert converted(images(2, 3, 33, 33, dtype=torch.float16)).dtype == torch.float16
    converted.double()(images(2, 3, 33, 33, dtype=torch.float64))


def test_state_dict(pair, tmp_path):
    model, converted = pair
    x = images(2, 3, 33, 33)
    state = converted.state_dict()
    assert {f"network.chain.{name}" for name in ("stem_0_weight", "stem_0_bias", "block_depthwise_0_weight", "fc_weight")} <= set(state)
    other = convert(trained(copy.deepcopy(model), images(4, 3, 33, 33, seed=9)), x)
    with torch.no_grad():
        assert not torch.allclose(other(x), converted(x))
        torch.save(state, tmp_path / "state.pt")
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert torch.equal(other(x), converted(x))


@torch.no_grad()
def test_copies(pair, device):
    converted = copy.deepcopy(pair[1]).to(device)
    x = images(2, 3, 33, 33, device=device)
    out = converted(x)
    copies = [copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))]
    for parameter in converted.parameters():
        parameter.zero_()
    for other in copies:
        assert torch.equal(other(x), out)
        assert other.report == converted.report and other.size == (33, 33)


@torch.no_grad()
def test_it_shares_no_memory(pair):
    model = copy.deepcopy(pair[0])
    x = images(2, 3, 33, 33)
    converted = convert(model, x)
    out = converted(x)
    for t in (*model.parameters(), *model.buffers()):
        t.zero_()
    assert torch.equal(converted(x), out)


def test_maps_are_channels_last(pair, device):
    layer = copy.deepcopy(pair[1]).to(device).network.chain
    with torch.no_grad():
        for layout in (torch.contiguous_format, torch.channels_last):
            x = images(2, 3, 33, 33, device=device).to(memory_format=layout)
            _, (_, *maps) = evaluate(x, list(layer.parameters()), layer.program, Call.run)
            maps = [m for m in maps if m.dim() == 4]
            assert len(maps) == 2 and all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)


def test_maps_are_channels_last_without_a_stem():
    x = images(2, 16, 9, 9)
    converted = convert(act(16, 8, 1).eval(), x)
    with torch.no_grad():
        assert converted(x).is_contiguous(memory_format=torch.channels_last)


def test_another_size(pair):
    with pytest.raises(RuntimeError, match=r"converted for images \(N, C, H, W\) of 33 x 33 pixels, got \(2, 3, 32, 33\)"):
        pair[1](images(2, 3, 32, 33))


def test_gradients(pair):
    """Frozen, yet differentiable in the image, and in the weights once they ask for it."""
    model, converted = pair[0], copy.deepcopy(pair[1])
    assert not any(p.requires_grad for p in converted.parameters())
    x, y = images(2, 3, 33, 33).requires_grad_(), images(2, 3, 33, 33).requires_grad_()
    converted(x).square().sum().backward()
    model(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-3, atol=1e-4)
    converted.requires_grad_()(x).sum().backward()
    assert all(p.grad is not None for p in converted.parameters())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_contexts(pair, context):
    model, converted = pair
    x = images(2, 3, 33, 33)
    with torch.no_grad():
        out = converted(x)
    with context():
        assert torch.equal(converted(x), out)
        assert torch.equal(convert(model, x)(x), out)


@torch.no_grad()
def test_export(pair, device):
    converted = copy.deepcopy(pair[1]).to(device)
    x = images(4, 3, 33, 33, device=device)
    program = torch.export.export(converted, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert {str(node.target).split(".")[0] for node in program.graph.nodes if node.op == "call_function"} == {"effnet"}
    for batch in (x, x[:1], torch.cat([x, x])):
        assert torch.equal(program.module()(batch), converted(batch))


@torch.no_grad()
def test_compile(pair, device):
    converted = copy.deepcopy(pair[1]).to(device)
    compiled = torch.compile(converted, fullgraph=True)
    x = images(4, 3, 33, 33, device=device)
    torch._dynamo.mark_dynamic(x, 0)
    torch.testing.assert_close(compiled(x), converted(x))
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(compiled(x[:3]), converted(x[:3]))


LOADS = """
import sys, torch, effnet_aot
torch.backends.cudnn.allow_tf32 = False
package, batches, results = sys.argv[1:]
loaded = torch._inductor.aoti_load_package(package)
torch.save([loaded(x) for x in torch.load(batches, weights_only=True)], results)
"""


@torch.no_grad()
def test_aot_inductor(pair, tmp_path, device):
    """Loaded by a process of its own, as a user would, and because what crashes there takes the whole session along."""
    converted = copy.deepcopy(pair[1]).to(device)
    x = images(4, 3, 33, 33, device=device)
    program = torch.export.export(converted, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "network.pt2"))
    batches, results = [x, x[:1].clone()], tmp_path / "results.pt"
    torch.save(batches, tmp_path / "batches.pt")
    path = os.pathsep.join([str(Path(effnet_aot.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-X", "faulthandler", "-c", LOADS, package, tmp_path / "batches.pt", results]
    child = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    if child.returncode < 0:
        skip_if_every_package_crashes(device, tmp_path)
    assert child.returncode == 0, child.stderr[-4000:]
    for batch, result in zip(batches, torch.load(results, weights_only=True), strict=True):
        torch.testing.assert_close(result, converted(batch))


@gpu
def test_cuda_graph(pair):
    converted = copy.deepcopy(pair[1]).cuda()
    x = images(4, 3, 33, 33, device="cuda")
    with torch.no_grad():
        graph = torch.cuda.CUDAGraph()
        converted(x)
        with torch.cuda.graph(graph):
            out = converted(x)
        x.copy_(images(4, 3, 33, 33, seed=8))
        graph.replay()
        assert torch.equal(out, converted(x))


def test_autocast(pair, device):
    converted = copy.deepcopy(pair[1]).to(device)
    x = images(4, 3, 33, 33, device=device)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        out = converted(x)
    assert out.dtype == torch.bfloat16 and error(out, converted(x).double()) < 0.05


# ---- the report ----


def test_explain(pair, capsys):
    torch.manual_seed(0)
    report = explain(ResNetLike().eval(), images(1, 3, 32, 32))
    text = capsys.readouterr().out
    assert text == str(report) and not report.complete
    for words in ("ResNetLike: 14 of 19 nodes map", "pointwise", "conv3.0", "conv2d batch_norm add relu", "N x 32 x 16 x 16", "max_pool2d", "dense 3x3 with stride (1, 1)"):
        assert words in text

    explain(pair[0], images(4, 3, 33, 33))
    assert capsys.readouterr().out == str(pair[1].report)


def test_multiply_adds(pair):
    expected = {"stem.0": 8 * 27 * 17 * 17, "block.expand.0": 8 * 24 * 289, "block.depthwise.0": 24 * 25 * 289, "block.project.0": 24 * 8 * 289}
    expected |= {"head.0": 8 * 40 * 289, "fc": 40 * 7, "dropout": 0}
    assert {row.path: row.multiply_adds for row in pair[1].report.rows} == expected


def test_public_names():
    assert effnet_aot.convert is convert and effnet_aot.explain is explain
    assert issubclass(effnet_aot.ConversionError, RuntimeError)
