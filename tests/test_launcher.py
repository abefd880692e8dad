"""The launcher against a stub driver: which kernel and image are chosen, what is passed, what is said when it fails.

Addresses are made up: nothing is computed. The right numbers are the business of the GPU tests.
"""

import ctypes
import os
import re
from math import ceil, inf, prod

import pytest
import stub_cuda
from stub_cuda import c_api
from stub_cuda.c_api import BF16, FP16, FP32, NARROW, NARROWING, NCHW, NHWC, RELU, RELU6, TF32, WIDENING, WIDENING16

pytestmark = pytest.mark.xdist_group("stub_cuda")  # one worker, so that the stub is built once

X, WEIGHT, OUT, RESIDUAL, BIAS, SCALE, MEAN, VAR = (0x7F0000000000 + i * 0x1000000 for i in range(8))
EXPAND, EXPAND_BIAS, DEPTHWISE, DEPTHWISE_BIAS, PROJECT, PROJECT_BIAS, WORKSPACE, OUT_BIAS = (0x7F1000000000 + i * 0x1000000 for i in range(8))
STREAM = 0x5EED
PRECISIONS = ("fp16", "bf16", "tf32", "fp32", "narrowing", "narrow", "widening", "widening16")

PROBLEMS = {
    "pointwise": dict(precision=FP16, layout=NHWC, x=X, weight=WEIGHT, out=OUT, batch=2, height=8, width=8, in_channels=16, out_channels=24),
    "pointwise_pool": dict(precision=FP16, layout=NHWC, x=X, weight=WEIGHT, out=OUT, batch=2, height=8, width=8, in_channels=16, out_channels=24),
    "narrow_weight": dict(weight=WEIGHT, out=OUT, scale=SCALE, rows=24, depth=96),
    "merge_weights": dict(precision=FP32, first=PROJECT, first_bias=PROJECT_BIAS, second=EXPAND, second_bias=EXPAND_BIAS, out=OUT, out_bias=OUT_BIAS, rows=96, depth=16, columns=72),
    "depthwise": dict(precision=FP16, layout=NHWC, x=X, weight=WEIGHT, out=OUT, batch=2, channels=16, height=9, width=7, kernel=3,
                      stride_y=1, stride_x=1, left=1, right=1, top=1, bottom=1),
    "conv": dict(precision=FP16, layout=NHWC, x=X, weight=WEIGHT, out=OUT, batch=2, in_channels=3, height=9, width=7, out_channels=32,
                 kernel_y=3, kernel_x=3, stride_y=2, stride_x=2, left=1, right=1, top=1, bottom=1),
    "linear": dict(precision=FP16, x=X, weight=WEIGHT, out=OUT, rows=10, in_features=64, out_features=40),
    "fold_batch_norm": dict(precision=FP32, out_precision=FP16, weight=WEIGHT, out=OUT, out_bias=OUT_BIAS, out_channels=40, in_channels=24, kernel_y=3, kernel_x=3,
                            epilogue=dict(bn_weight=SCALE, bn_bias=BIAS, bn_mean=MEAN, bn_var=VAR)),
    "expand_depthwise": dict(precision=FP16, layout=NHWC, x=X, expand_weight=EXPAND, expand_bias=EXPAND_BIAS, depthwise_weight=DEPTHWISE,
                             depthwise_bias=DEPTHWISE_BIAS, out=OUT, workspace=WORKSPACE, batch=2, in_channels=16, hidden=96, height=9, width=7, kernel=3,
                             stride_y=1, stride_x=1, left=1, right=1, top=1, bottom=1, biases_are_fp32=1, depthwise_taps_first=1, activation=RELU6),
    "mbconv": dict(precision=FP16, layout=NHWC, x=X, expand_weight=EXPAND, expand_bias=EXPAND_BIAS, depthwise_weight=DEPTHWISE, depthwise_bias=DEPTHWISE_BIAS,
                   project_weight=PROJECT, project_bias=PROJECT_BIAS, out=OUT, workspace=WORKSPACE, batch=2, in_channels=16, hidden=96, out_channels=16,
                   height=9, width=7, kernel=3, stride_y=1, stride_x=1, left=1, right=1, top=1, bottom=1,
                   biases_are_fp32=1, depthwise_taps_first=1, activation=RELU6),
}  # fmt: skip
# What differs of a block that reads the map of PROBLEMS["conv"]; and both together.
UNEXPANDED = dict(expand_weight=None, expand_bias=None, in_channels=32, hidden=32)


def both(stem={}, block={}, **changes):
    stem = PROBLEMS["conv"] | dict(out=None, width=8, x_strides=[216, 72, 8, 1], epilogue=dict(bias=BIAS, vectors_are_fp32=1, activation=RELU)) | stem
    block = PROBLEMS["mbconv"] | UNEXPANDED | dict(x=None, workspace=None, height=5, width=4) | block
    return dict(stem=stem, block=block, workspace=WORKSPACE) | changes


PROBLEMS["stem_mbconv"] = both()
# Problems of what only tuning brings into a library.
MERGED = {
    "merged_depthwise": PROBLEMS["expand_depthwise"] | {"expand_scale": SCALE},
    "merged_pool": PROBLEMS["pointwise_pool"] | {"weight_scale": SCALE, "epilogue": {"bias": BIAS, "vectors_are_fp32": 1}},
}
# Of a block of TF32 whose maps may be narrow.
NARROW_WEIGHTS = dict(narrow_depthwise_weight=WEIGHT, narrow_depthwise_scale=SCALE, narrow_project_weight=MEAN, narrow_project_scale=VAR)


def launch(op, device=0, stream=STREAM, **changes):
    return ["launch", op, (PROBLEMS | MERGED)[op] | changes, device, stream]


@pytest.fixture(scope="module")
def few_images(tmp_path_factory):
    """The torch-free part of the library over few_images.cpp instead of the generated registry."""
    return stub_cuda.torch_free_library(tmp_path_factory.mktemp("few_images"), stub_cuda.HERE / "few_images.cpp")


# ---- which variant ----

# op, what differs from PROBLEMS, the variant without its tile, as a regular expression
CHOICES = [
    ("pointwise", {}, "fp16_nhwc_folded"),
    ("pointwise", {"precision": BF16}, "bf16_nhwc_folded"),
    ("pointwise", {"precision": TF32}, "tf32_nhwc_folded"),
    ("pointwise", {"precision": FP32}, "fp32_nhwc_aligned"),
    ("pointwise", {"residual": RESIDUAL}, "fp16_nhwc_folded"),
    ("pointwise", {"epilogue": {"bias": BIAS + 2}}, "fp16_nhwc_folded"),  # vectors are promised nothing
    ("pointwise", {"x": X + 8}, "fp16_nhwc_generic"),
    ("pointwise", {"weight": WEIGHT + 2}, "fp16_nhwc_generic"),
    ("pointwise", {"out": OUT + 4}, "fp16_nhwc_generic"),
    ("pointwise", {"residual": RESIDUAL + 8}, "fp16_nhwc_generic"),
    ("pointwise", {"in_channels": 20}, "fp16_nhwc_generic"),
    ("pointwise", {"out_channels": 28}, "fp16_nhwc_generic"),
    ("pointwise", {"width": 7}, "fp16_nhwc_folded"),
    ("pointwise", {"layout": NCHW}, "fp16_nchw_aligned"),
    ("pointwise", {"layout": NCHW, "out_channels": 28}, "fp16_nchw_aligned"),
    ("pointwise", {"layout": NCHW, "in_channels": 20}, "fp16_nchw_generic"),
    ("pointwise", {"layout": NCHW, "height": 7, "width": 7}, "fp16_nchw_generic"),
    ("pointwise", {"layout": NCHW, "height": 1, "width": 1}, "fp16_nhwc_folded"),  # one pixel lies the same way
    ("pointwise_pool", {}, "fp16_nhwc_aligned"),
    ("pointwise_pool", {"precision": TF32}, "tf32_nhwc_aligned"),
    ("pointwise_pool", {"out": OUT + 2, "out_channels": 13}, "fp16_nhwc_aligned"),
    ("pointwise_pool", {"x": X + 8}, "fp16_nhwc_generic"),
    ("pointwise_pool", {"weight": WEIGHT + 8}, "fp16_nhwc_generic"),
    ("pointwise_pool", {"in_channels": 20}, "fp16_nhwc_generic"),
    ("pointwise_pool", {"layout": NCHW}, "fp16_nchw_generic"),
    ("pointwise_pool", {"layout": NCHW, "height": 1, "width": 1}, "fp16_nhwc_aligned"),
    ("depthwise", {}, "fp16_k3_(nhwc_aligned|s1_rows)"),
    ("depthwise", {"kernel": 5}, "fp16_k5_s1_folded"),
    ("depthwise", {"kernel": 5, "precision": BF16, "stride_y": 2, "stride_x": 2}, "bf16_k5_s2_folded"),
    ("depthwise", {"kernel": 5, "epilogue": {"bias": BIAS + 4, "vectors_are_fp32": 1}}, "fp16_k5_s1_folded"),
    ("depthwise", {"kernel": 5, "epilogue": {"bias": BIAS}}, "fp16_k5_nhwc_aligned"),
    ("depthwise", {"kernel": 5, "epilogue": {"bn_weight": SCALE, "bn_bias": BIAS, "bn_mean": MEAN, "bn_var": VAR, "vectors_are_fp32": 1}}, "fp16_k5_nhwc_aligned"),
    ("depthwise", {"kernel": 5, "weight": WEIGHT + 2}, "fp16_k5_nhwc_aligned"),
    ("depthwise", {"kernel": 5, "stride_x": 2}, "fp16_k5_nhwc_aligned"),
    ("depthwise", {"precision": BF16}, "bf16_k3_(nhwc_aligned|s1_rows)"),
    ("depthwise", {"precision": TF32}, "fp32_k3_(nhwc_aligned|s1_rows)"),  # no matrix product, no TF32
    ("depthwise", {"precision": FP32, "kernel": 5, "epilogue": {"bias": BIAS}}, "fp32_k5_s1_folded"),
    ("depthwise", {"weight": WEIGHT + 2}, "fp16_k3_(nhwc_aligned|s1_rows)"),
    ("depthwise", {"x": X + 8}, "fp16_k3_nhwc_generic"),
    ("depthwise", {"out": OUT + 8}, "fp16_k3_nhwc_generic"),
    ("depthwise", {"channels": 12}, "fp16_k3_nhwc_generic"),
    ("depthwise", {"layout": NCHW}, "fp16_k3_nchw_generic"),
    ("conv", {}, "fp16_k3_nhwc_folded"),
    ("conv", {"in_channels": 4}, "fp16_k3_nhwc_aligned"),
    ("conv", {"precision": FP32}, "fp32_k3_nhwc_aligned"),
    ("conv", {"x": X + 2, "weight": WEIGHT + 2}, "fp16_k3_nhwc_folded"),
    ("conv", {"out": OUT + 8}, "fp16_k3_nhwc_generic"),
    ("conv", {"out_channels": 12}, "fp16_k3_nhwc_generic"),
    ("conv", {"layout": NCHW}, "fp16_k3_nchw_generic"),
    ("linear", {}, "fp16_aligned"),
    ("linear", {"precision": BF16}, "bf16_aligned"),
    ("linear", {"precision": TF32}, "tf32_aligned"),
    ("linear", {"precision": FP32}, "fp32_aligned"),
    ("linear", {"rows": 3}, "fp16_aligned"),
    ("linear", {"x": X + 8}, "fp16_generic"),
    ("linear", {"weight": WEIGHT + 8}, "fp16_generic"),
    ("linear", {"out": OUT + 8}, "fp16_generic"),
    ("linear", {"in_features": 60}, "fp16_generic"),
    ("linear", {"out_features": 41}, "fp16_generic"),
    ("pointwise", {"precision": NARROWING}, "narrowing_nhwc_folded"),
    ("pointwise", {"precision": WIDENING}, "widening_nhwc_folded"),
    ("pointwise", {"precision": WIDENING16, "weight_scale": SCALE}, "widening16_nhwc_folded"),
    ("depthwise", {"precision": NARROW}, "narrow_k3_s1_rows"),
    ("narrow_weight", {}, "fp32_to_fp16"),
    ("narrow_weight", {"taps_first": 1, "depth": 9}, "fp32_to_fp16_taps_first"),
    ("merge_weights", {}, "fp32_to_fp32"),
    ("merge_weights", {"precision": FP16}, "fp16_to_fp32"),
    ("fold_batch_norm", {}, "fp32_to_fp16"),
    ("fold_batch_norm", {"out_precision": BF16}, "fp32_to_bf16"),
    ("fold_batch_norm", {"precision": TF32, "out_precision": FP32}, "fp32_to_fp32"),
    ("fold_batch_norm", {"precision": BF16, "out_precision": BF16, "weight": WEIGHT + 2}, "bf16_to_bf16"),
    ("fold_batch_norm", {"precision": FP16, "in_channels": 1, "taps_first": 1}, "fp16_to_fp16"),
]


def kind(variant):
    """Its name without the schedule and the tile: which of them is taken is the tuning table's business."""
    return re.sub(r"(_w\d(s\d)?)?(_k\d)?_[0-9x]+$", "", variant)


@pytest.fixture(scope="module")
def chosen(stub):
    """One process makes all of CHOICES, in this order."""
    return stub.run(*[launch(op, **changes) for op, changes, _ in CHOICES]).assert_ok()


@pytest.mark.parametrize("index", range(len(CHOICES)), ids=[f"{i}-{op}-{expected}" for i, (op, _, expected) in enumerate(CHOICES)])
def test_variant_and_grid(chosen, index):
    op, changes, expected = CHOICES[index]
    made = chosen.launches[index]
    image, p = made["image"], PROBLEMS[op] | changes
    tile = image["variant"].rpartition("_")[2]
    assert image["op"] == op and re.fullmatch(expected, kind(image["variant"]))

    rows, columns = map(int, tile.split("x")[-2:] if op == "depthwise" else tile.split("x")[:2])
    if op in ("pointwise", "pointwise_pool"):
        as_rows = p["layout"] == NHWC or p["height"] * p["width"] == 1
        images, pixels = (1, p["batch"] * p["height"] * p["width"]) if as_rows else (p["batch"], p["height"] * p["width"])
        tiles = p["batch"] if op == "pointwise_pool" else images * ceil(pixels / rows)
        tiles *= ceil(p["out_channels"] / columns)
    elif op == "linear":
        tiles = ceil(p["rows"] / rows) * ceil(p["out_features"] / columns)
    elif op == "narrow_weight":
        tiles = ceil(p["rows"] / rows)
    elif op == "merge_weights":
        tiles = ceil(p["rows"] / rows) * ceil(p["columns"] / columns)
    elif op == "fold_batch_norm":
        tiles = ceil(p["out_channels"] / rows) * ceil(p["in_channels"] * p["kernel_y"] * p["kernel_x"] / columns)
    else:
        kernel, stride = p.get("kernel", p.get("kernel_y")), p["stride_y"]
        plane = ((p["height"] + 2 - kernel) // stride + 1) * ((p["width"] + 2 - kernel) // p["stride_x"] + 1)
        if op == "conv":
            tiles = p["batch"] * ceil(plane / rows) * ceil(p["out_channels"] / columns)
        elif "_folded_" in image["variant"]:  # columns of all images, by channels
            out_height, out_width = (p["height"] + 2 - kernel) // stride + 1, (p["width"] + 2 - kernel) // p["stride_x"] + 1
            tiles = ceil(out_height / int(tile.split("x")[0])) * ceil(p["batch"] * ceil(out_width / rows) * p["channels"] / columns)
        elif "_rows_" in image["variant"]:  # rows and columns of one image
            out_height, out_width = (p["height"] + 2 - kernel) // stride + 1, (p["width"] + 2 - kernel) // stride + 1
            tiles = p["batch"] * ceil(out_height / int(tile.split("x")[0])) * ceil(out_width / rows) * ceil(p["channels"] / columns)
        elif p["layout"] == NHWC:
            tiles = ceil(p["batch"] * plane / rows) * ceil(p["channels"] / columns)
        else:
            tiles = ceil(plane / rows) * ceil(p["batch"] * p["channels"] / columns)
    assert made["grid"] == [tiles, 1, 1]
    assert made["block"] == [image["threads"], 1, 1]
    assert made["shared"] == image["shared"]
    assert made["stream"] == STREAM


LARGE = dict(batch=64, height=40, width=40)
STRIDE = dict(stride_y=2, stride_x=2)
# What differs from PROBLEMS["mbconv"], and the variants of the launches: the whole block, its beginning and the projection, or its three (two) steps. Mostly
# numbers of channels that are in no tuning table.
STEPS = ["fp16_nhwc_folded", r"fp16_k3_(nhwc_aligned|s\d_rows)", "fp16_nhwc_folded"]
BEGUN = [r"fp16_k3_s\d_w.*", "fp16_nhwc_folded"]
BLOCKS = [
    ({}, ["fp16_c16_s1_16x16x32"]),  # few pixels: the warps of a block share them
    (LARGE, ["fp16_c16_s1_32x16x16"]),
    ({**LARGE, "out_channels": 8}, ["fp16_c16_s1_32x16x16"]),
    ({**LARGE, "out_channels": 24}, ["fp16_c16_s1_32x32x16"]),
    ({**LARGE, **STRIDE, "out_channels": 8}, ["fp16_c16_s2_32x16x16"]),
    ({**LARGE, "precision": BF16}, ["bf16_c16_s1_32x16x16"]),
    ({**LARGE, "residual": RESIDUAL}, ["fp16_c16_s1_32x16x16"]),
    ({**LARGE, "left": 0, "right": 2, "top": 2, "bottom": 0}, ["fp16_c16_s1_32x16x16"]),
    ({"in_channels": 24, "hidden": 144, "out_channels": 24}, ["fp16_c24_s1_16x32x64"]),
    ({**LARGE, **STRIDE, "in_channels": 24, "hidden": 144, "out_channels": 40}, [r"fp16_(wide_)?c24_s2_\d+x40x.*"]),
    ({**LARGE, "in_channels": 32, "hidden": 192, "out_channels": 40}, ["fp16_c32_s1_32x48x16"]),
    ({**LARGE, **STRIDE, "in_channels": 32, "hidden": 192, "out_channels": 56}, ["fp16_c32_s2_16x64x32"]),
    ({**STRIDE, "in_channels": 40, "hidden": 240, "out_channels": 72}, ["fp16_c40_s2_16x80x64"]),
    (UNEXPANDED, [r"fp16_unexpanded_c32_s1_16x16_rows\d+"]),
    ({**UNEXPANDED, **LARGE, "out_channels": 24}, [r"fp16_unexpanded_c32_s1_16x32_rows\d+"]),
    ({"out_channels": 40}, BEGUN),  # more than any variant has
    ({"hidden": 64}, BEGUN),
    ({"in_channels": 48, "hidden": 288}, BEGUN),
    ({"in_channels": 128, "hidden": 768, **STRIDE}, BEGUN),
    ({"in_channels": 128, "hidden": 768, "height": 17, "width": 16}, STEPS),  # a large map
    ({"x": X + 8}, ["fp16_nhwc_generic", *STEPS[1:]]),
    ({"out": OUT + 8}, [*BEGUN[:1], "fp16_nhwc_generic"]),
    ({"depthwise_weight": DEPTHWISE + 2}, STEPS),
    ({"expand_bias": EXPAND_BIAS + 4}, STEPS),
    ({"out_channels": 12}, [*BEGUN[:1], "fp16_nhwc_generic"]),
    ({"kernel": 5, "left": 2, "right": 2}, ["fp16_nhwc_folded", "fp16_k5_s1_folded", "fp16_nhwc_folded"]),
    ({"stride_x": 2}, STEPS),
    ({"left": 3}, BEGUN),  # a window with nothing of the image in it
    ({"bottom": 3}, BEGUN),
    ({"layout": NCHW}, ["fp16_nchw_generic", "fp16_k3_nchw_generic", "fp16_nchw_generic"]),
    ({"precision": TF32, "out_channels": 40}, [r"narrowing_k3_s1_w.*", "widening_nhwc_folded"]),
    ({"precision": TF32, **LARGE, "out_channels": 40}, ["fp32_to_fp16", "narrowing_nhwc_folded", "narrow_k3_s1_rows", "widening16_nhwc_folded"]),  # many pixels
    ({"precision": TF32, "kernel": 5, "left": 2, "right": 2}, ["narrowing_nhwc_folded", "narrow_k5_s1_folded", "widening_nhwc_folded"]),
    ({"precision": TF32, "out_channels": 40, "depthwise_taps_first": 0}, ["narrowing_nhwc_folded", "narrow_k3_s1_rows", "widening_nhwc_folded"]),
    # Narrow maps are for what lies between 0 and 6, and for kernels that are aligned and go the same way in both directions.
    ({"precision": TF32, "out_channels": 40, "activation": RELU}, [r"tf32_k3_s1_w.*", "tf32_nhwc_folded"]),
    ({"precision": TF32, "out_channels": 40, "activation": c_api.LINEAR}, [r"tf32_k3_s1_w.*", "tf32_nhwc_folded"]),
    ({"precision": TF32, "out_channels": 40, "stride_x": 2}, ["tf32_nhwc_folded", "fp32_k3_nhwc_aligned", "tf32_nhwc_folded"]),
    ({"precision": TF32, "x": X + 8}, ["tf32_nhwc_generic", "fp32_k3_s1_rows", "tf32_nhwc_folded"]),
    ({"precision": TF32, "layout": NCHW}, ["tf32_nchw_generic", "fp32_k3_nchw_generic", "tf32_nchw_generic"]),
    ({"precision": TF32, **UNEXPANDED, **STRIDE}, ["fp32_k3_(nhwc_aligned|s2_rows)", "tf32_nhwc_folded"]),
    ({"precision": FP32}, ["fp32_nhwc_aligned", "fp32_k3_(nhwc_aligned|s1_rows)", "fp32_nhwc_aligned"]),
    ({"activation": RELU}, BEGUN),
    ({"activation": c_api.LINEAR}, BEGUN),
    ({"biases_are_fp32": 0}, STEPS),
    ({"depthwise_taps_first": 0}, STEPS),
    ({"kernel": 5, "left": 2, "right": 2, "depthwise_taps_first": 0}, ["fp16_nhwc_folded", "fp16_k5_s1_folded", "fp16_nhwc_folded"]),
    *(({f"{step}_bias": None}, STEPS) for step in ("expand", "depthwise")),
    ({"project_bias": None}, BEGUN),
    ({**UNEXPANDED, **STRIDE}, STEPS[1:]),
    ({**UNEXPANDED, "in_channels": 16, "hidden": 16}, STEPS[1:]),
]


def padded(size):
    return ceil(size / 256) * 256


def test_blocks(stub):
    """Which run in one kernel, on which grid, and what the workspace must hold."""
    calls = [call for changes, _ in BLOCKS for call in (launch("mbconv", **changes), ["workspace", "mbconv", PROBLEMS["mbconv"] | changes])]
    run = stub.run(*calls).assert_ok()
    launches = iter(run.launches)
    for (changes, expected), workspace in zip(BLOCKS, run.results[1::2], strict=True):
        p, made = PROBLEMS["mbconv"] | changes, [next(launches) for _ in expected]
        variants = [m["image"]["variant"] for m in made]
        for variant, pattern in zip(variants, expected):
            assert re.fullmatch(pattern, variant if len(made) == 1 else kind(variant)), (changes, variants)
        out_height, out_width = ((p[size] + sum(p[side] for side in sides) - p["kernel"]) // p[stride] + 1 for size, sides, stride in
                                 (("height", ("top", "bottom"), "stride_y"), ("width", ("left", "right"), "stride_x")))  # fmt: skip
        if len(made) > 1:
            image = p["batch"] * p["hidden"] * (2 if p["precision"] in (FP16, BF16) or variants[-1].startswith("widening") else 4)
            narrowed = made[0]["image"]["op"] == "narrow_weight"
            steps = made[narrowed:]
            size = (padded(image * p["height"] * p["width"]) if len(steps) == 3 else 0) + image * out_height * out_width
            if narrowed:
                weight, scale = padded(size), padded(size) + padded(2 * p["out_channels"] * p["hidden"])
                size = scale + 4 * p["out_channels"]
                numbers = made[0]["parameters"]
                assert (numbers["weight"], numbers["rows"], numbers["depth"]) == (PROJECT, p["out_channels"], p["hidden"])
                assert (numbers["out"], numbers["scale"]) == (WORKSPACE + weight, WORKSPACE + scale)
                assert (steps[-1]["parameters"]["weight"], steps[-1]["parameters"]["p1"]) == (numbers["out"], numbers["scale"])
            assert workspace["value"] == size
            begun = ["expand_depthwise"] if len(steps) == 2 and p["expand_weight"] else ["pointwise", "depthwise"][1 - bool(p["expand_weight"]) :]
            assert [m["image"]["op"] for m in steps] == [*begun, "pointwise"]
            continue
        assert workspace["value"] == 0 and made[0]["image"]["op"] == "mbconv"
        rows = int(re.search(r"_(\d+)x", variants[0])[1])
        if p["expand_weight"]:
            blocks = ceil(p["batch"] * out_height * out_width / rows)
        else:
            blocks = ceil(p["batch"] * out_width / rows) * ceil(out_height / int(variants[0].partition("_rows")[2]))
        assert made[0]["grid"] == [blocks, 1, 1] and made[0]["block"] == [made[0]["image"]["threads"], 1, 1]
        assert made[0]["stream"] == STREAM
    assert next(launches, None) is None


def test_parameters_of_blocks(stub):
    numbers = dict(batch=3, height=23, width=31, left=1, right=2, top=2, bottom=0, out_channels=8)
    step = dict(p1=0, p2=0, p3=0, eps=0, trailing=[0, 0])
    whole = dict(x=X, depthwise_weight=DEPTHWISE, depthwise_bias=DEPTHWISE_BIAS, project_weight=PROJECT, project_bias=PROJECT_BIAS, out=OUT,
                 batch=3, height=23, width=31, out_height=23, out_width=32, out_channels=8, left=1, top=2, high=6, trailing=[0, 0])  # fmt: skip
    filtered = WORKSPACE + ceil(3 * 96 * 23 * 31 * 2 / 256) * 256
    depthwise = dict(weight=DEPTHWISE, p0=DEPTHWISE_BIAS, low=0, batch=3, height=23, width=31, out_height=23, out_width=32, stride_y=1, stride_x=1, left=1, top=2, flags=2 | 4)
    run = stub.run(
        launch("mbconv", **numbers, residual=RESIDUAL), launch("mbconv", **numbers | UNEXPANDED),
        launch("mbconv", **numbers, residual=RESIDUAL, activation=RELU),
        launch("mbconv", **numbers | UNEXPANDED, depthwise_taps_first=0, biases_are_fp32=0, project_bias=None),
    ).assert_ok()  # fmt: skip
    assert [made["parameters"] for made in run.launches] == [
        whole | dict(expand_weight=EXPAND, expand_bias=EXPAND_BIAS, residual=RESIDUAL, flags=8),
        whole | dict(expand_weight=0, expand_bias=0, residual=0, flags=0),
        step | dict(x=X, weight=EXPAND, p0=EXPAND_BIAS, residual=0, out=WORKSPACE, pixels=3 * 23 * 31, in_channels=16, out_channels=96, low=0, high=inf, flags=2 | 4),
        step | depthwise | dict(x=WORKSPACE, out=filtered, channels=96, high=inf, weight_channel=1, weight_tap=96),
        step | dict(x=filtered, weight=PROJECT, p0=PROJECT_BIAS, residual=RESIDUAL, out=OUT, pixels=3 * 23 * 32, in_channels=96, out_channels=8,
                    low=-inf, high=inf, flags=2 | 4 | 8),
        step | depthwise | dict(x=X, out=WORKSPACE, channels=32, high=6, weight_channel=9, weight_tap=1, flags=2),
        step | dict(x=WORKSPACE, weight=PROJECT, p0=0, residual=0, out=OUT, pixels=3 * 23 * 32, in_channels=32, out_channels=8, low=-inf, high=inf, flags=0),
    ]  # fmt: skip


# A variant of expand_depthwise, what differs from PROBLEMS, and its band of output rows and how many there are.
BANDS = [
    ("fp16_k3_s1_w4x1_64x16x6_rows1", {}, 9, 1),  # 63 pixels
    ("fp16_k3_s1_w4x1_64x16x6_rows1", {"width": 8}, 5, 2),  # windows of 8 rows, of 6 at most: two bands of the same size
    ("fp16_k3_s1_w4x1_64x16x6_rows1", {"width": 21}, 1, 9),
    ("fp16_k3_s2_w8x1_256x32x3_rows1", {"height": 30, "width": 30, **STRIDE}, 3, 5),
    ("fp16_k3_s2_w8x1_256x32x3_rows1", {"height": 15, "width": 15, **STRIDE}, 8, 1),
    ("fp16_k3_s1_w8x1_256x32x3_rows2", {"height": 20, "width": 20}, 10, 2),
]  # fmt: skip


def test_bands(stub):
    """The output rows of a block: their windows lie in its pixels."""
    run = stub.run(*(launch("expand_depthwise", variant=variant, hidden=104, **changes) for variant, changes, _, _ in BANDS)).assert_ok()
    for (variant, changes, band, bands), made in zip(BANDS, run.launches, strict=True):
        assert made["parameters"]["band"] == band
        assert made["grid"] == [2 * bands * ceil(104 / int(variant.split("x")[2])), 1, 1]
    width = BANDS[0][0], {"width": 22}
    (refused,) = stub.run(launch("expand_depthwise", variant=width[0], **width[1])).results
    assert refused["error"] == f"effnet::expand_depthwise: variant {width[0]} does not have rows of 22 pixels"


def test_parameters_of_a_beginning(stub):
    numbers = dict(batch=3, height=13, width=11, left=1, right=2, top=2, bottom=0)
    run = stub.run(launch("expand_depthwise", **numbers), ["workspace", "expand_depthwise", PROBLEMS["expand_depthwise"] | numbers]).assert_ok()
    given = dict(x=X, expand_weight=EXPAND, expand_bias=EXPAND_BIAS, depthwise_weight=DEPTHWISE, depthwise_bias=DEPTHWISE_BIAS, out=OUT, in_channels=16, hidden=96,
                 height=13, width=11, out_height=13, out_width=12, left=1, top=2, low=0, high=6, trailing=[0, 0])  # fmt: skip
    (made,) = run.launches
    assert made["parameters"] == given | {"band": made["parameters"]["band"]} and run.results[1]["value"] == 0
    two = stub.run(launch("expand_depthwise", biases_are_fp32=0), ["workspace", "expand_depthwise", PROBLEMS["expand_depthwise"] | {"biases_are_fp32": 0}]).assert_ok()
    assert [m["image"]["op"] for m in two.launches] == ["pointwise", "depthwise"] and two.results[1]["value"] == 2 * 96 * 9 * 7 * 2
    assert two.launches[0]["parameters"]["out"] == two.launches[1]["parameters"]["x"] == WORKSPACE and two.launches[1]["parameters"]["out"] == OUT


def test_a_block_whose_variant_does_not_fit(stub):
    run = stub.run(
        launch("mbconv", variant="fp16_c16_s1_16x16x32", out_channels=24), launch("mbconv", variant="fp16_c16_s2_16x16x32", out_channels=24),
        launch("mbconv", variant="fp16_c16_s1_16x16x32", kernel=5),
    )  # fmt: skip
    first, second, third = (r["error"] for r in run.results)
    assert first == "effnet::mbconv: variant fp16_c16_s1_16x16x32 does not have 24 output channels"
    others = "fp16_c16_s1_32x16x16, fp16_c16_s1_16x16x32, fp16_c16_s1_32x32x16, fp16_c16_s1_16x32x32"  # and what is tuned
    assert second.startswith(f"effnet::mbconv: variant must be one that fits ({others}") and second.endswith("), got 'fp16_c16_s2_16x16x32'")
    assert third == "effnet::mbconv: variant must be one that fits (), got 'fp16_c16_s1_16x16x32'"
    assert {r["status"] for r in run.results} == {c_api.INVALID_ARGUMENT} and run.launches == []


@pytest.mark.parametrize("op, small, large", [
    ("pointwise", {"batch": 1, "height": 4, "width": 4}, {"batch": 64, "height": 112, "width": 112, "out_channels": 128}),
    ("linear", {"rows": 1}, {"rows": 8192, "out_features": 4096}),
])  # fmt: skip
def test_tile_grows_with_the_problem(stub, op, small, large):
    run = stub.run(launch(op, **small), launch(op, **large)).assert_ok()
    areas = [prod(map(int, made["image"]["variant"].split("_")[-1].split("x")[:2])) for made in run.launches]
    assert areas[0] < areas[1]


def block_of(variant):
    """A problem that a variant of mbconv was made for, by its name."""
    if "_unexpanded_" in variant:
        return UNEXPANDED
    in_channels, stride = (int(re.search(rf"_{letter}(\d+)_", variant)[1]) for letter in "cs")
    return dict(in_channels=in_channels, hidden=6 * in_channels, stride_y=stride, stride_x=stride)


def test_a_row_has_places_for_so_many_features(stub):
    variant = next(i["variant"] for i in stub_cuda.manifest()["images"] if i["op"] == "linear" and "_row_" in i["variant"] and i["variant"].startswith("fp16"))
    deep = int(re.search(r"_deep(\d+)_", variant)[1])
    run = stub.run(launch("linear", variant=variant, in_features=deep), launch("linear", variant=variant, in_features=deep + 8))
    assert run.results[0]["status"] == c_api.OK and run.launches[0]["grid"] == [10 * 5, 1, 1]
    assert run.results[1]["error"] == f"effnet::linear: variant {variant} does not have {deep + 8} input features"


def test_named_variant(stub, few_images):
    """Every variant can be asked for by name, on a problem that it fits; a generic one also where an aligned one serves."""
    images = {(i["op"], i["variant"]) for i in stub_cuda.manifest()["images"]}
    calls = []
    for op, variant in sorted(images):
        changes = {"variant": variant}
        if op == "narrow_weight":
            changes["taps_first"] = int("_taps_first_" in variant)
        else:
            narrow_between = op == "mbconv" and variant.startswith("narrow_")
            changes["precision"] = TF32 if narrow_between else PRECISIONS.index(variant.split("_")[0])
        if variant.startswith("widening16"):
            changes["weight_scale"] = SCALE
        if op == "fold_batch_norm":
            changes["out_precision"] = PRECISIONS.index(variant.split("_")[2])
        elif op not in ("linear", "merge_weights", "narrow_weight"):
            changes["layout"] = NCHW if "_nchw_" in variant else NHWC
        if op == "depthwise":
            changes["kernel"] = 5 if "_k5_" in variant else 3
            changes["stride_y"] = changes["stride_x"] = 2 if "_s2_" in variant else 1
        if op in ("expand_depthwise", "merged_depthwise"):
            changes |= {"kernel": int(variant.split("_k")[1][0])} | (STRIDE if "_s2_" in variant else {})
        if op in MERGED:
            changes["in_channels"] = int(re.search(r"_deep(\d+)_", variant)[1])
        if op == "mbconv":
            changes |= block_of(variant) | (NARROW_WEIGHTS if narrow_between else {})
        if "_resident" in variant:
            changes["in_channels"] = int(variant.split("x")[-1])
        if op == "stem_mbconv":
            common = {name: changes.pop(name) for name in ("precision", "layout")}
            changes |= both(common, common)
        calls.append(launch(op, **changes))
    run = stub.run(*calls).assert_ok()
    assert [(made["image"]["op"], made["image"]["variant"]) for made in run.launches] == sorted(images)

    wrong = [launch("pointwise", variant="aligned", x=X + 2), launch("pointwise", variant="none such"), launch("pointwise", precision=BF16)]
    run = stub.run(*wrong, devices="8.9", **few_images)
    assert [r["error"] for r in run.results] == [
        "effnet::pointwise: variant must be one that fits (generic), got 'aligned'",
        "effnet::pointwise: variant must be one that fits (aligned, generic), got 'none such'",
        "effnet_aot: the library holds no variant of pointwise for this data type and layout",
    ]
    assert [r["status"] for r in run.results] == [c_api.INVALID_ARGUMENT, c_api.INVALID_ARGUMENT, c_api.NO_IMAGE]


# What differs of the stem and of the block, and the variants of the launches.
STEMS = [
    ({}, {}, [r"fp16_paired_14x16_rows\d+"]),
    ({"precision": BF16}, {"precision": BF16}, [r"bf16_paired_14x16_rows\d+"]),
    ({"precision": TF32}, {"precision": TF32, "activation": RELU}, [r"tf32_paired_(14|28)x16_rows\d+"]),
    ({"x": X + 4, "weight": WEIGHT + 2}, {}, [r"fp16_paired_14x16_rows\d+"]),
    ({"x": X + 2}, {}, [r"fp16_strided_14x16_rows\d+"]),
    ({"width": 7}, {}, [r"fp16_strided_14x16_rows\d+"]),
    ({"x_strides": [216, 1, 24, 3]}, {}, [r"fp16_strided_14x16_rows\d+"]),
    ({"precision": TF32, "x": X + 4}, {"precision": TF32, "activation": RELU}, ["tf32_k3_nhwc_folded", "fp32_k3_(nhwc_aligned|s1_rows)", "tf32_nhwc_folded"]),  # none is strided
    ({"right": 4}, {"width": 6}, [r"fp16_strided_14x16_rows\d+"]),  # a pixel of the stem sees no picture
    ({"precision": FP32}, {"precision": FP32}, ["fp32_k3_nhwc_aligned", "fp32_k3_(nhwc_aligned|s1_rows)", "fp32_nhwc_aligned"]),
    ({"in_channels": 4}, {}, ["fp16_k3_nhwc_aligned", r"fp16_unexpanded_c32_s1_16x16_rows\d+"]),
    ({"epilogue": {"bias": BIAS, "vectors_are_fp32": 1}}, {}, ["fp16_k3_nhwc_folded", r"fp16_unexpanded_c32_s1_16x16_rows\d+"]),
    ({"epilogue": {"bias": BIAS + 4, "vectors_are_fp32": 1, "activation": RELU}}, {}, ["fp16_k3_nhwc_aligned", r"fp16_unexpanded_c32_s1_16x16_rows\d+"]),
    ({}, {"residual": RESIDUAL}, ["fp16_k3_nhwc_folded", r"fp16_unexpanded_c32_s1_16x16_rows\d+"]),
    ({}, {"out_channels": 48}, ["fp16_k3_nhwc_folded", *STEPS[1:]]),
    ({}, {"depthwise_taps_first": 0}, ["fp16_k3_nhwc_folded", *STEPS[1:]]),
    ({}, {"left": 3}, ["fp16_k3_nhwc_folded", *STEPS[1:]]),
]


def test_stems_and_blocks(stub):
    """Which run in one kernel, and what the workspace must hold: the stem's map, then the block's own."""
    problems = [both(stem, block) for stem, block, _ in STEMS]
    run = stub.run(*(call for p in problems for call in (["launch", "stem_mbconv", p, 0, STREAM], ["workspace", "stem_mbconv", p]))).assert_ok()
    launches = iter(run.launches)
    for (*_, expected), p, workspace in zip(STEMS, problems, run.results[1::2], strict=True):
        made = [next(launches) for _ in expected]
        for m, pattern in zip(made, expected):
            variant = m["image"]["variant"]
            assert re.fullmatch(pattern, variant) or (len(made) > 1 and re.fullmatch(pattern, kind(variant))), (p, variant)
        element = 2 if p["block"]["precision"] in (FP16, BF16) else 4
        stem_map = ceil(2 * 32 * p["block"]["height"] * p["block"]["width"] * element / 256) * 256
        if len(made) == 1:
            columns, rows = map(int, re.search(r"_(\d+)x16_rows(\d+)", made[0]["image"]["variant"]).groups())
            strips = 2  # of 14 columns: each of the two images has one
            assert workspace["value"] == 0 and made[0]["grid"] == [ceil(strips * 14 / columns) * ceil(5 / rows), 1, 1]
        else:
            assert made[0]["parameters"]["out"] == made[1]["parameters"]["x"] == WORKSPACE and workspace["value"] >= stem_map
        if len(made) == 3:
            assert made[1]["parameters"]["out"] == WORKSPACE + stem_map
    assert next(launches, None) is None


def test_parameters_of_a_stem_and_a_block(stub):
    stem = dict(batch=3, height=45, width=62, top=0, bottom=1, x_strides=[10000, 3000, 64, 1], weight_strides=[27, 1, 9, 3])
    run = stub.run(["launch", "stem_mbconv", both(stem, dict(batch=3, height=22, width=31, left=2, right=0, top=0, out_channels=8)), 0, STREAM]).assert_ok()
    assert run.launches[0]["parameters"] == dict(
        x=X, stem_weight=WEIGHT, stem_bias=BIAS, depthwise_weight=DEPTHWISE, depthwise_bias=DEPTHWISE_BIAS, project_weight=PROJECT, project_bias=PROJECT_BIAS, out=OUT,
        batch=3, in_channels=3, height=45, width=62, stem_height=22, stem_width=31, out_height=21, out_width=31, out_channels=8,
        x_image=10000, x_channel=3000, x_row=64, x_column=1, weight_out=27, weight_in=1, weight_row=9, weight_column=3,
        stem_left=1, stem_top=0, left=2, top=0, stem_high=inf, high=6, trailing=[0, 0],
    )  # fmt: skip


# ---- what is passed ----


def test_folding_passes(stub):
    """Strides of the weight; of the result those of its order; the statistics."""
    depthwise = dict(in_channels=1, kernel_y=5, kernel_x=3, taps_first=1)
    run = stub.run(launch("fold_batch_norm"), launch("fold_batch_norm", **depthwise), launch("fold_batch_norm", weight_strides=[216, 1, 72, 24])).assert_ok()
    passed = [made["parameters"] for made in run.launches]
    names = ("weight_out", "weight_in", "weight_row", "weight_column", "out_channel", "out_element")
    assert [tuple(p[name] for name in names) for p in passed] == [(216, 9, 3, 1, 216, 1), (15, 15, 3, 1, 1, 40), (216, 1, 72, 24, 216, 1)]
    for p, (channels, *kernel) in zip(passed, ((24, 3, 3), (1, 5, 3), (24, 3, 3))):
        assert [p[name] for name in ("weight", "p0", "p1", "p2", "p3", "out", "out_bias")] == [WEIGHT, SCALE, BIAS, MEAN, VAR, OUT, OUT_BIAS]
        assert [p[name] for name in ("out_channels", "in_channels", "kernel_y", "kernel_x", "flags")] == [40, channels, *kernel, 1]


EPILOGUES = [
    # the struct, then what the kernel gets
    (None, dict(p0=0, p1=0, p2=0, p3=0, eps=0, low=-inf, high=inf, flags=0)),
    (dict(bias=BIAS), dict(p0=BIAS, p1=0, p2=0, p3=0, eps=0, low=-inf, high=inf, flags=2)),
    (dict(bias=BIAS, vectors_are_fp32=1, activation=RELU), dict(p0=BIAS, p1=0, p2=0, p3=0, eps=0, low=0, high=inf, flags=2 | 4)),
    (dict(bn_weight=SCALE, bn_bias=BIAS, bn_mean=MEAN, bn_var=VAR, bn_eps=0.125, activation=RELU6),
     dict(p0=SCALE, p1=BIAS, p2=MEAN, p3=VAR, eps=0.125, low=0, high=6, flags=1)),
    (dict(bn_weight=SCALE, bn_bias=BIAS, bn_mean=MEAN, bn_var=VAR, vectors_are_fp32=1),
     dict(p0=SCALE, p1=BIAS, p2=MEAN, p3=VAR, eps=0, low=-inf, high=inf, flags=1 | 4)),
]  # fmt: skip

# Every number different, so that two that changed places are seen.
ARGUMENTS = [
    ("pointwise", dict(batch=3, height=5, width=11, in_channels=17, out_channels=29, residual=RESIDUAL),
     dict(residual=RESIDUAL, pixels=3 * 5 * 11, out_channels=29, in_channels=17, flags=8)),
    ("pointwise", dict(layout=NCHW, batch=3, height=5, width=11, in_channels=17, out_channels=29),
     dict(residual=0, pixels=5 * 11, out_channels=29, in_channels=17)),
    ("pointwise_pool", dict(batch=3, height=5, width=11, in_channels=17, out_channels=29), dict(images=3, pixels=55, out_channels=29, in_channels=17)),
    ("depthwise", dict(batch=3, channels=19, height=23, width=31, kernel=5, stride_y=1, stride_x=2, left=4, right=7, top=6, bottom=9),
     dict(batch=3, channels=19, height=23, width=31, out_height=34, out_width=19, stride_y=1, stride_x=2, left=4, top=6, weight_channel=25, weight_tap=1)),
    ("conv", dict(batch=3, in_channels=5, height=37, width=41, out_channels=29, kernel_y=7, kernel_x=4, stride_y=3, stride_x=2, left=8, right=9, top=10, bottom=11),
     dict(in_channels=5, height=37, width=41, out_channels=29, out_height=18, out_width=28, kernel_y=7, kernel_x=4, stride_y=3, stride_x=2, left=8, top=10,
          x_image=5 * 37 * 41, x_channel=1, x_row=5 * 41, x_column=5, weight_out=5 * 28, weight_in=28, weight_row=4, weight_column=1)),
    ("conv", dict(layout=NCHW, kernel_y=3, kernel_x=5, left=2, right=2),
     dict(in_channels=3, height=9, width=7, out_channels=32, out_height=5, out_width=4, kernel_y=3, kernel_x=5, stride_y=2, stride_x=2, left=2, top=1,
          x_image=3 * 63, x_channel=63, x_row=7, x_column=1, weight_out=45, weight_in=15, weight_row=5, weight_column=1)),
    ("conv", dict(x_strides=[1000, 300, 30, 3], weight_strides=[100, 10, 2, 5]),
     dict(in_channels=3, height=9, width=7, out_channels=32, out_height=5, out_width=4, kernel_y=3, kernel_x=3, stride_y=2, stride_x=2, left=1, top=1,
          x_image=1000, x_channel=300, x_row=30, x_column=3, weight_out=100, weight_in=10, weight_row=2, weight_column=5)),
    ("linear", dict(rows=13, in_features=57, out_features=43), dict(rows=13, in_features=57, out_features=43)),
]  # fmt: skip


def test_every_parameter(stub):
    cases = [(op, changes | {"epilogue": epilogue}, numbers, tail) for op, changes, numbers in ARGUMENTS for epilogue, tail in EPILOGUES]
    run = stub.run(*[launch(op, **changes) for op, changes, _, _ in cases]).assert_ok()
    assert len(run.launches) == len(cases)
    for (op, _, numbers, tail), made in zip(cases, run.launches):
        assert made["kernel"].startswith(f"effnet_{op}") and made["image"]["op"] == op
        flags = numbers.get("flags", 0) | tail["flags"]
        # Two pointers that Triton appends to every kernel's parameters; ours use neither.
        assert made["parameters"] == {"x": X, "weight": WEIGHT, "out": OUT, **tail, **numbers, "flags": flags, "trailing": [0, 0]}


def test_float32_vectors_are_not_special_for_float32(stub):
    run = stub.run(launch("pointwise", precision=FP32, epilogue={"bias": BIAS, "vectors_are_fp32": 1})).assert_ok()
    assert run.launches[0]["parameters"]["flags"] == 2


# ---- which image ----


def test_images_are_what_the_manifest_says(stub):
    run = stub.run(launch("pointwise"), hash=True).assert_ok()
    listed = {(i["op"], i["variant"], i["arch"], i["kind"], i["sha256"], i["bytes"], i["shared"], i["threads"]) for i in stub_cuda.manifest()["images"]}
    held = {
        (k["op"], k["variant"], f"{k['capability'] // 10}.{k['capability'] % 10}", k["kind"], k["sha256"], k["bytes"], k["shared"], k["threads"])
        for k in run.kernels.values()
    }
    assert held and held == listed
    assert all(k["sha256"] == k["actual_sha256"] for k in run.kernels.values())


# few_images.cpp: the aligned variant has cubins for 8.0, 8.6 and 9.0 and PTX for 8.0, the generic one 8.9 as both.
@pytest.mark.parametrize("capability, policy, aligned, generic", [
    ("8.0", "", "cubin sm_80", None),
    ("8.6", "", "cubin sm_86", None),
    ("8.7", "auto", "cubin sm_86", None),
    ("8.9", "", "cubin sm_86", "cubin sm_89"),  # same major, next lower minor
    ("9.0", "", "cubin sm_90", "ptx compute_89"),
    ("10.0", "", "ptx compute_80", "ptx compute_89"),
    ("12.0", "", "ptx compute_80", "ptx compute_89"),
    ("7.5", "", None, None),
    ("9.0", "ptx", "ptx compute_80", "ptx compute_89"),
    ("8.6", "ptx", "ptx compute_80", None),
    ("9.0", "cubin", "cubin sm_90", None),
    ("12.0", "cubin", None, None),
])  # fmt: skip
def test_image_of_a_capability(stub, few_images, capability, policy, aligned, generic):
    run = stub.run(launch("pointwise"), launch("pointwise", x=X + 2), ["device_image", 0], devices=capability, EFFNET_AOT_IMAGE=policy, **few_images)
    expected = [name for name in (aligned, generic) if name]
    names = [("cubin sm_" if i["kind"] == "cubin" else "ptx compute_") + str(i["capability"]) for i in (made["image"] for made in run.launches)]
    assert names == expected
    assert [r["status"] for r in run.results] == [c_api.OK if name else c_api.NO_IMAGE for name in (aligned, generic)] + [c_api.OK]
    assert run.results[2]["value"] == (aligned or "none")


def test_error_where_no_image_serves(stub, few_images):
    error = stub.run(launch("pointwise"), devices="7.5", **few_images).results[0]["error"]
    assert error == (
        "effnet::pointwise: no image of effnet_pointwise serves device 0, Stub GPU 0 (compute capability 7.5); built are: "
        "cubin sm_80, cubin sm_86, cubin sm_90, ptx compute_80. To build for this GPU (8.0 or later is needed), run in a checkout of the sources: "
        "EFFNET_AOT_ARCHS=7.5 pip install --no-build-isolation --force-reinstall --no-deps ."
    )
    error = stub.run(launch("pointwise"), devices="12.0", EFFNET_AOT_IMAGE="cubin", **few_images).results[0]["error"]
    assert "ptx compute_80, of which EFFNET_AOT_IMAGE admits only cubins. To build" in error


def test_error_where_the_driver_refuses_the_image(stub, few_images):
    run = stub.run(launch("pointwise"), ["preload", 0], devices="8.6", reject="cubin", **few_images)
    for result in run.results:
        assert result["status"] == c_api.NO_IMAGE
        for part in ("cubin sm_86", "device 0, Stub GPU 0 (compute capability 8.6)", "CUDA_ERROR_NO_BINARY_FOR_GPU (209: ", "built are: ", "EFFNET_AOT_ARCHS=8.6 pip install"):
            assert part in result["error"]
    run = stub.run(launch("pointwise"), devices="12.0", reject="ptx", **few_images)
    assert run.results[0]["status"] == c_api.NO_IMAGE and "CUDA_ERROR_INVALID_PTX" in run.results[0]["error"]
    assert run.launches == []


def test_error_where_the_image_policy_is_unknown(stub):
    run = stub.run(launch("pointwise"), EFFNET_AOT_IMAGE="sass")
    assert run.results[0]["status"] == c_api.INVALID_ARGUMENT
    assert run.results[0]["error"] == "effnet_aot: EFFNET_AOT_IMAGE must be auto, cubin or ptx, got 'sass'"


@pytest.mark.parametrize("capability, attributes", [("8.0", []), ("8.6", [60 * 1024]), ("9.0", [227 * 1024]), ("12.0", [60 * 1024])])
def test_shared_memory_above_48_kib_is_asked_for(stub, few_images, capability, attributes):
    run = stub.run(launch("pointwise"), launch("pointwise"), devices=capability, **few_images).assert_ok()
    assert [(r["attribute"], r["value"], r["for"]) for r in run.of("cuKernelSetAttribute")] == [(8, value, 0) for value in attributes]


# ---- devices, contexts, threads ----


def test_two_devices_of_one_kind(stub, few_images):
    calls = [launch("pointwise", device=d) for d in (0, 1, 0, 1)]
    run = stub.run(*calls, devices="8.6,8.6", **few_images).assert_ok()
    assert len(run.loads) == 1  # a library serves all devices
    assert [r["for"] for r in run.of("cuKernelSetAttribute")] == [0, 1]
    assert [r["device"] for r in run.launches] == [0, 1, 0, 1]
    assert [r["device"] for r in run.of("cuKernelGetFunction")] == [0, 1]
    assert [r["of"] for r in run.of("cuDevicePrimaryCtxRetain")] == [0, 1]


def test_two_devices_of_two_kinds(stub, few_images):
    run = stub.run(launch("pointwise", device=1), launch("pointwise", device=0), ["device_image", 1], devices="8.6,9.0", **few_images).assert_ok()
    assert [(r["device"], r["image"]["capability"], r["shared"], r["block"]) for r in run.launches] == [
        (1, 90, 200 * 1024, [256, 1, 1]), (0, 86, 60 * 1024, [128, 1, 1]),
    ]  # fmt: skip
    assert run.results[2]["value"] == "cubin sm_90"


def test_context_is_pushed_only_when_another_is_current(stub):
    run = stub.run(["use_device", 0], launch("pointwise", device=0), launch("pointwise", device=1), launch("pointwise", device=0), devices="8.9,8.9").assert_ok()
    assert [r["device"] for r in run.launches] == [0, 1, 0]
    assert [(r["call"], r["device"]) for r in run.records if r["call"] in ("cuCtxPushCurrent", "cuCtxPopCurrent")] == [("cuCtxPushCurrent", 1), ("cuCtxPopCurrent", 1)]


def test_threads_load_once(stub):
    calls = [launch("pointwise"), launch("depthwise"), launch("linear")]
    run = stub.run(["threads", 8, calls])
    assert [r["error"] for results in run.results[0] for r in results if r["status"]] == []
    assert sorted(r["image"]["op"] for r in run.loads) == ["depthwise", "linear", "pointwise"]
    assert len(run.launches) == 24 and len({r["thread"] for r in run.launches}) == 8
    assert len(run.of("cuInit")) == len(run.of("cuDevicePrimaryCtxRetain")) == 1
    assert len(run.of("cuCtxPushCurrent")) == len(run.of("cuCtxPopCurrent")) == 24


def test_loading_is_allowed_within_a_capture(stub):
    run = stub.run(launch("pointwise")).assert_ok()
    during = [r["call"] if "mode" not in r else r["mode"] for r in run.records]
    relaxed, global_ = 2, 0
    assert during.index(relaxed) < during.index("cuLibraryLoadData") < during.index("cuKernelGetFunction") < during.index(global_) < during.index("cuLaunchKernelEx")


def test_single_calls_wait_for_what_came_before(stub, few_images):
    """Their weights may be its result. Only the kernels of a network start early."""
    run = stub.run(launch("pointwise"), launch("pointwise"), devices="9.0", **few_images).assert_ok()
    assert [(r["image"]["capability"], r["early"]) for r in run.launches] == 2 * [(90, False)]


def test_blocks_of_early_kernels_are_spread(stub, few_images):
    """By shared memory that leaves a multiprocessor room for its share of them alone. The stub's GPUs have 128."""
    grids = 500, 1, 128, 129, 384, 512, 513, 100_000
    kib = 8, 227, 227, 113, 75, 56, 8, 8  # of 228, of which a block loses one
    run = stub.run(["sequence", 1, *grids], devices="9.0", **few_images).assert_ok()
    assert [(r["grid"][0], r["early"], r["shared"] // 1024) for r in run.launches] == [(grid, i > 0, size) for i, (grid, size) in enumerate(zip(grids, kib))]
    kib = 8, 113, 113, 56, 37, 27, 8, 8  # another lane's as many beside them
    run = stub.run(["sequence", 2, *grids], devices="9.0", **few_images).assert_ok()
    assert [(r["grid"][0], r["early"], r["shared"] // 1024) for r in run.launches] == 2 * [(grid, i > 0, size) for i, (grid, size) in enumerate(zip(grids, kib))]
    run = stub.run(["sequence", 1, *grids], devices="8.9", **few_images).assert_ok()
    assert [(r["early"], r["shared"]) for r in run.launches] == len(grids) * [(False, 8 * 1024)]


def test_preload_leaves_nothing_but_the_launch(stub):
    calls = [launch(op, **changes) for op, changes, _ in CHOICES]
    run = stub.run(["preload", 0], *calls).assert_ok()
    variants = {(k["op"], k["variant"]) for k in run.kernels.values()}
    assert {(r["image"]["op"], r["image"]["variant"]) for r in run.loads} == variants and len(run.loads) == len(variants)
    first = next(i for i, r in enumerate(run.records) if r["call"] == "cuLaunchKernelEx") - 1
    assert [r["call"] for r in run.records[first:]] == ["cuCtxPushCurrent", "cuLaunchKernelEx", "cuCtxPopCurrent"] * len(calls)


def test_log_explains_each_choice_once(stub, few_images):
    calls = [launch("pointwise"), launch("pointwise"), launch("pointwise", device=1)]
    lines = stub.run(*calls, devices="8.6,12.0", EFFNET_AOT_LOG="1", **few_images).assert_ok().stderr.splitlines()
    assert len(lines) == 2
    assert "pointwise/aligned on device 0 (Stub GPU 0): cubin sm_86" in lines[0]
    assert "pointwise/aligned on device 1 (Stub GPU 1): ptx compute_80" in lines[1]
    assert stub.run(*calls[:2], devices="8.6", EFFNET_AOT_LOG="0", **few_images).assert_ok().stderr == ""


# ---- failures ----


def test_failed_launch_names_kernel_and_grid(stub, few_images):
    run = stub.run(launch("pointwise"), launch("pointwise"), devices="8.6", fail="cuLaunchKernelEx#1=700", **few_images)
    assert run.results[0]["status"] == c_api.DRIVER_ERROR
    assert run.results[0]["error"] == (
        "effnet::pointwise: launching effnet_pointwise (aligned, cubin sm_86) on device 0 with grid (2, 1, 1) failed: "
        "CUDA_ERROR_ILLEGAL_ADDRESS (700: text of the stub)"
    )
    assert run.results[1]["status"] == c_api.OK
    assert len(run.of("cuCtxPushCurrent")) == len(run.of("cuCtxPopCurrent")) == 2  # also where it failed


@pytest.mark.parametrize("call", ["cuInit", "cuDeviceGetCount", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2", "cuLibraryLoadData", "cuLibraryGetKernel", "cuKernelGetFunction"])
def test_failure_on_the_way_is_reported_and_not_remembered(stub, call):
    run = stub.run(launch("pointwise"), launch("pointwise"), fail=f"{call}#1=2")
    assert run.results[0]["status"] == c_api.DRIVER_ERROR and "CUDA_ERROR_OUT_OF_MEMORY (2: text of the stub)" in run.results[0]["error"]
    assert run.results[1]["status"] == c_api.OK and len(run.launches) == 1


def test_unnamed_driver_error(stub):
    assert "unknown error (4321: " in stub.run(launch("pointwise"), fail="cuLaunchKernelEx=4321").results[0]["error"]


def test_no_driver(stub):
    try:
        ctypes.CDLL("libcuda.so.1")
        pytest.skip("this machine has a driver")
    except OSError:
        pass
    run = stub.run(launch("pointwise"), ["preload", 0], ["device_image", 0], LD_LIBRARY_PATH=os.environ.get("LD_LIBRARY_PATH", ""))
    for result in run.results:
        assert result["status"] == c_api.NO_DRIVER
        assert result["error"].startswith("effnet_aot: no CUDA driver on this machine (libcuda.so.1: cannot open shared object file")


def test_old_driver(tmp_path):
    old = stub_cuda.StubDriver(tmp_path, lacking="cuLibraryLoadData")
    run = old.run(launch("pointwise"), launch("linear"), version="11080")
    for result in run.results:
        assert result["status"] == c_api.NO_DRIVER
        assert result["error"] == "effnet_aot: the CUDA driver is too old: it has no cuLibraryLoadData, which came with CUDA 12.0; this one is of CUDA 11.8"


def test_driver_without_a_gpu(stub):
    result = stub.run(launch("pointwise"), devices="").results[0]
    assert result["status"] == c_api.DRIVER_ERROR
    assert result["error"] == "effnet_aot: starting the CUDA driver failed: CUDA_ERROR_NO_DEVICE (100: text of the stub)"


def test_device_that_does_not_exist(stub):
    run = stub.run(launch("pointwise", device=2), launch("pointwise", device=-1), launch("pointwise", device=64), ["preload", 2], devices="8.9,8.9")
    assert {r["status"] for r in run.results} == {c_api.INVALID_ARGUMENT}
    assert run.results[0]["error"] == run.results[3]["error"] == "effnet_aot: device 2 does not exist: the driver sees 2"
    assert run.results[1]["error"] == "effnet_aot: device ordinal must be between 0 and 63, got -1"


def test_use_after_fork(stub):
    in_child = [launch("pointwise"), launch("linear"), ["preload", 0], ["device_image", 0]]
    run = stub.run(launch("pointwise"), ["fork", in_child], launch("linear"))
    for result in run.results[1]:
        assert result["status"] == c_api.DRIVER_ERROR
        assert result["error"].startswith("effnet_aot: CUDA was used before this process was forked and cannot be used in the child")
    assert run.results[0]["status"] == run.results[2]["status"] == c_api.OK
    assert not any("refused" in r for r in run.records)  # the driver never saw the child

    run = stub.run(["fork", in_child])  # nothing was used before: the child is a process like any other
    assert [r["status"] for r in run.results[0]] == [c_api.OK] * 4
