"""Every variant in the library without a GPU: the launcher hands the PTX that ships to a driver that executes it on the CPU."""

import importlib
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from stub_cuda import torch_free_library
from test_launcher import BF16, launch
from variants import EMBEDDED

from effnet_aot.aot.architectures import Target
from effnet_aot.aot.compiler import compile_variant
from effnet_aot.aot.registry import Image, write_registry

# A process checks the variants of one op and precision, on one worker.
GROUPS = {}
for op, variant in EMBEDDED:
    GROUPS.setdefault((op, variant.split("_")[0]), []).append(variant)


def check(stub, names, *library):
    """What is wrong with each of the variants, None where all is right, and what the driver says."""
    child = Path(__file__).with_name("variants_child.py")
    done = subprocess.run([sys.executable, child, *library], input=json.dumps(names), env=stub.executing(stub.new_log()), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return dict(zip([variant for _, variant in names], json.loads(done.stdout), strict=True)), done.stderr


@cache
def outcomes(stub, op, precision):
    return check(stub, [(op, variant) for variant in GROUPS[op, precision]])


@pytest.mark.parametrize(
    "op, precision, variant",
    [
        pytest.param(op, precision, variant, id=f"{op}-{variant}", marks=pytest.mark.xdist_group(f"emulated_{op}_{precision}"))
        for (op, precision), variants in GROUPS.items() for variant in variants
    ],
)  # fmt: skip
def test_variant(stub, op, precision, variant):
    wrong, stderr = outcomes(stub, op, precision)
    assert not wrong[variant], wrong[variant] + stderr


# What tuning tries besides: of every kernel that nothing ships with, the cases of its code.
CANDIDATES = {
    "expand_depthwise": ["fp16_k3_s1_w4x2_64x64x6_rows2", "bf16_k3_s2_w8x1_256x16x4_rows2", "tf32_k3_s1_w4x2_64x32x6_rows2", "fp16_k3_s1_w2x1_64x16x6_rows2", "narrowing_k3_s2_w8x1_128x16x3_rows2"],
    "mbconv": ["fp16_wide_c16_s2_32x32x32_w1", "bf16_wide_c24_s1_16x32x32_w2", "fp16_wide_c40_s2_64x80x16_w1", "fp16_wide_c16_s1_32x16x16_w1_tiles2", "bf16_wide_c16_s2_16x32x32_w1_tiles2", "tf32_wide_c16_s1_16x24x32_w1", "tf32_wide_c24_s2_16x40x64_w4", "tf32_unexpanded_c32_s1_32x16_rows4",
               "narrow_c16_s2_16x24x32_w1", "narrow_c16_s1_32x16x16_w1_tiles2", "narrow_c24_s2_16x40x64_w4", "narrow_c24_s1_32x32x16_w1",
               "fp16_wide_c16_s2_16x24x64_w4_eager", "fp16_wide_c24_s2_16x40x64_w4_eager", "narrow_c16_s2_16x24x32_w2_eager"],
    "pointwise": ["fp16_nhwc_folded_w4s3_k4_16x32x64", "tf32_nhwc_folded_w8s2_k8_16x32x16", "fp16_nhwc_folded_w8s3_128x128x32", "bf16_nhwc_resident2_w4s3_64x64x128",
                  "tf32_nhwc_resident2_w4s3_64x128x64", "narrowing_nhwc_resident2_w4s3_64x128x64", "widening_nhwc_folded_w4s3_k4_16x16x32", "widening16_nhwc_folded_w8s2_128x64x64"],
    "pointwise_pool": ["fp16_nhwc_images2_w4s3_128x128x32", "tf32_nhwc_images4_w8s3_256x128x32"],
    "depthwise": ["fp16_k3_s1_folded_w4_4x2x256", "bf16_k3_s2_folded_w4_14x2x512", "fp32_k3_s2_folded_w4_4x1x256", "fp32_k5_s1_folded_w2_7x2x64", "fp16_k5_s2_folded_w2_2x2x128", "narrow_k3_s2_folded_w4_4x2x512"],
    "linear": ["bf16_aligned_w4s2_k4_32x16x64", "fp16_row_deep1280_w4_1x8x256", "tf32_row_deep2048_w8_1x8x512"],
    "merged_depthwise": ["fp16_k3_s1_deep256_w4x2s3_64x64_rows2", "fp16_k3_s2_deep512_w8x1s4_128x32_rows2", "fp16_k3_s1_deep768_w4x1s4_64x32_rows2_images2", "tf32_k3_s2_deep512_w8x1s2_256x64_rows2_images3", "tf32_k3_s2_deep512_w8x1s3_128x16_rows2",
                         "tf32_k3_s1_deep704_w4x1s6_64x16_rows1", "tf32_k3_s1_deep256_w8x1s2_256x64_rows2", "fp16_k3_s2_deep704_w4x2s6_64x32_rows1"],
    "merged_pool": ["fp16_deep1152_w4x1s6_64x16", "tf32_deep1152_w4x2s9_64x16", "fp16_deep1152_w4x2s3_64x64_images2", "tf32_deep1152_w4x1s3_64x32_images5"],
    "stem_mbconv": ["fp16_paired_28x32_rows2", "bf16_paired_56x16_rows3_by1", "tf32_paired_28x16_rows12", "fp16_strided_56x16_rows3"],
}  # fmt: skip


@pytest.mark.xdist_group("stub_cuda")
def test_candidates(stub, tmp_path):
    variants, images, target = [], [], Target(89, "ptx")
    for op, names in CANDIDATES.items():
        known = {v.name: v for v in importlib.import_module(f"triton_src.{op}").candidates()}
        for variant in (known[name] for name in names):
            path = tmp_path / variant.name
            compile_variant(variant, target.capability, path)
            images.append(Image(variant, target, path.with_suffix(".ptx").read_bytes(), **json.loads(path.with_suffix(".json").read_text())))
            variants.append(variant)
    registry = write_registry(tmp_path, sorted(variants, key=lambda v: v.op), images, {"triton": "none", "ptxas": "none"}, {str(v) for v in variants}, [])[0]
    library = torch_free_library(tmp_path, registry)
    wrong, stderr = check(stub, [(v.op, v.name) for v in variants], library["library"])
    assert not any(wrong.values()), "\n".join(filter(None, wrong.values())) + stderr

    resident, images = "bf16_nhwc_resident2_w4s3_64x64x128", "fp16_nhwc_images2_w4s3_128x128x32"
    pixels = dict(batch=100, height=32, width=32, out_channels=136)
    run = stub.run(
        launch("pointwise", precision=BF16, variant=resident, in_channels=72, **pixels), launch("pointwise", precision=BF16, variant=resident, in_channels=72, out_channels=136),
        launch("pointwise_pool", variant=images, batch=5, out_channels=136),
        launch("pointwise", precision=BF16, variant=resident, in_channels=136), launch("pointwise", precision=BF16, variant=resident, in_channels=64),
        launch("pointwise_pool", variant=images, height=5, width=13), **library,
    )  # fmt: skip
    assert [made["grid"][0] for made in run.launches] == [2 * 128 // 3 * 3, 2 * 3, 3 * 2], "what the GPU holds at once; no more than there are rows"
    assert [r["error"] for r in run.results[3:]] == [
        f"effnet::pointwise: variant {resident} does not have in_channels 136", f"effnet::pointwise: variant {resident} does not have in_channels 64",
        f"effnet::pointwise_pool: variant {images} does not have 65 pixels",
    ]  # fmt: skip
