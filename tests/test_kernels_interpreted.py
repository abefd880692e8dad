"""The Triton source against float64, without a GPU: through Triton's interpreter, on small shapes.

Inputs lie between NaNs and outputs between guards, so that reading or writing outside is seen too.
"""

import importlib.util
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is needed at build time only, and not installed here")

BN6 = dict(epilogue="bn", activation="relu6")
NAN, INF = "nan", "inf"

# Every variant that ships, and split products; the generic ones on sizes that are multiples of nothing. More than one tile
# each way, and a depth that is no multiple of BLOCK_K. Then what the variants have in common, on the smallest of them.
CASES = {
    "pointwise": [
        dict(variant="*_aligned_*", shape=(2, 72, 8, 9, 40), **BN6, fp32_vectors=True, residual=True),
        dict(variant="*_folded_*", shape=(2, 72, 8, 9, 40), epilogue="bias", activation="relu6", fp32_vectors=True, residual=True),
        dict(variant="fp16_nhwc_folded_*", shape=(1, 8, 3, 3, 8), epilogue="none"),
        dict(variant="*_k?_*", shape=(1, 552, 5, 7, 72), epilogue="bias", activation="relu6", residual=True),
        dict(variant="*_resident?_*", shape=(3, 136, 8, 9, 168), epilogue="bias", activation="relu6", fp32_vectors=True, residual=True),
        dict(variant="*_generic_*", shape=(2, 71, 5, 7, 67), **BN6, residual=True),
        *[
            dict(variant=f"{precision}_{layout}_generic_*", shape=(2, 20, 5, 3, 24), epilogue=epilogue, activation=activation, fp32_vectors=fp32, residual=residual)
            for layout in ("nhwc", "nchw")
            for precision, epilogue, activation, fp32, residual in [
                ("fp16", "none", "none", False, False),
                ("fp16", "none", "relu6", False, True),
                ("fp16", "bias", "none", False, True),
                ("fp16", "bias", "relu", True, True),
                ("fp16", "bn", "none", False, False),
                ("bf16", "bias", "relu6", True, False),
                ("bf16", "bn", "relu", False, True),
                ("fp32", "bn", "none", False, True),
                ("fp32", "bias", "relu6", False, False),
            ]
        ],
        *[
            dict(variant=f"fp16_{layout}_generic_*", shape=(2, 20, 5, 3, 24), activation=activation,
                 special=[(NAN, (0, 3, 1, 1)), (INF, (1, 0, 4, 2)), ("-inf", (1, 7, 0, 0))])
            for layout in ("nhwc", "nchw") for activation in ("none", "relu", "relu6")
        ],
        # Narrow maps; what is written in float32 may have a residual and any activation.
        dict(variant="*", narrow=True, shape=(2, 72, 8, 9, 40), epilogue="bias", activation="relu6"),
        dict(variant="*_resident?_*", narrow=True, shape=(3, 136, 8, 9, 168), epilogue="bias", activation="relu6"),
        dict(variant="widening*", narrow=True, shape=(2, 72, 8, 9, 40), epilogue="none", residual=True),
        dict(variant="*_folded_64x64x32", narrow=True, shape=(1, 8, 3, 3, 8), epilogue="none", activation="relu6", special=[(NAN, (0, 3, 1, 1))]),
        dict(variant="fp32_*_generic_*", shape=(1, 1, 1, 1, 1)),
        dict(variant="fp32_nhwc_generic_*", shape=(130, 5, 1, 1, 3), **BN6),
    ],
    "pointwise_pool": [
        dict(variant="*_aligned_*", shape=(2, 72, 7, 10, 40), **BN6, fp32_vectors=True),
        dict(variant="*_images?_*", shape=(5, 72, 7, 8, 264), **BN6, fp32_vectors=True),
        dict(variant="*_generic_*", shape=(2, 71, 5, 13, 37), epilogue="bn", activation="relu"),
        *[dict(variant=f"fp16_{layout}_generic_*", shape=(2, 20, 3, 3, 24), epilogue=epilogue) for layout in ("nhwc", "nchw") for epilogue in ("none", "bias", "bn")],
        dict(variant="fp16_*_generic_*", shape=(2, 20, 3, 3, 24), activation="relu6", special=[(NAN, (0, 3, 1, 1)), (INF, (1, 7, 0, 0))]),
        dict(variant="fp32_*_generic_*", shape=(3, 7, 1, 1, 5), activation="relu"),
    ],
    "depthwise": [
        dict(variant="*_aligned_*", shape=(2, 40, 9, 6), stride=(1, 1), padding=(2, 2, 2, 2), **BN6, fp32_vectors=True),
        dict(variant="*_generic_*", shape=(1, 37, 7, 9), stride=(2, 2), padding=(1, 2, 1, 2), **BN6),
        *[
            dict(variant=f"fp16_k{kernel}_nhwc_generic_*", shape=(1, 5, 8, 9), stride=stride, padding=padding, epilogue="bn", activation=activation)
            for kernel in (3, 5)
            for stride, padding, activation in [
                ((1, 1), (1, 1, 1, 1), "relu6"),
                ((2, 2), (0, 1, 0, 1), "relu"),
                ((2, 1), (3, 0, 0, 4), "none"),
                ((1, 2), (0, 0, 0, 0), "relu6"),
            ]
        ],
        *[
            dict(variant=f"narrow_k3_s{stride}_*", narrow=True, shape=(1, 40, 7, 18), stride=(stride, stride), padding=padding, epilogue=epilogue, activation="relu6", taps_first=taps_first)
            for stride, padding, epilogue, taps_first in [(1, (2, 2, 2, 2), "bias", True), (2, (1, 2, 1, 2), "bias", True), (1, (1, 1, 1, 1), "none", False)]
        ],
        dict(variant="narrow_k3_s1_*", narrow=True, shape=(1, 8, 6, 5), stride=(1, 1), padding=(0, 1, 0, 1), activation="relu6", special=[(NAN, (0, 1, 0, 0))]),
        dict(variant="fp32_k3_nchw_generic_*", shape=(1, 3, 8, 9), stride=(2, 2), padding=(0, 1, 0, 1), epilogue="none"),
        dict(variant="fp32_k5_nhwc_generic_*", shape=(1, 3, 1, 1), stride=(1, 1), padding=(2, 2, 2, 2)),
        dict(variant="fp16_*_generic_*", shape=(1, 37, 6, 5), stride=(1, 2), padding=(1, 1, 1, 1), taps_first=True),
        dict(variant="fp16_k3_s1_rows_*", shape=(1, 40, 6, 5), stride=(1, 1), padding=(1, 1, 1, 1), taps_first=True),
        dict(variant="fp16_k3_*_generic_*", shape=(1, 4, 5, 5), stride=(1, 1), padding=(1, 1, 1, 1), activation="relu6",
             special=[(NAN, (0, 1, 0, 0)), (INF, (0, 2, 2, 2))]),
        *[
            dict(variant=f"*_s{stride}_rows_*", shape=(1, 40, 7, 18), stride=(stride, stride), padding=padding, **BN6, fp32_vectors=True)
            for stride, padding in [(1, (2, 2, 2, 2)), (2, (1, 2, 1, 2))]
        ],
        *[
            dict(variant=f"fp16_k3_s{stride}_rows_*", shape=(1, 8, 6, 5), stride=(stride, stride), padding=(0, 1, 0, 1), activation="relu6",
                 special=[(NAN, (0, 1, 0, 0)), (INF, (0, 2, 5, 4))])
            for stride in (1, 2)
        ],
    ],
    "conv": [
        dict(variant="*_aligned_*", shape=(2, 3, 17, 15, 40), kernel=(3, 3), stride=(2, 2), padding=(1, 1, 1, 1), **BN6, fp32_vectors=True),
        dict(variant="*_generic_*", shape=(2, 3, 17, 15, 37), kernel=(3, 3), stride=(2, 2), padding=(0, 1, 0, 1), epilogue="bn", activation="relu"),
        *[
            dict(variant=f"fp16_{'k3' if kernel == (3, 3) else 'any'}_{layout}_generic_*", shape=(2, channels, 9, 8, 20), kernel=kernel, stride=stride, padding=padding, x=lies, activation="relu")
            for layout in ("nhwc", "nchw")
            for channels, kernel, stride, padding, lies in [
                (3, (3, 3), (2, 2), (1, 1, 1, 1), "nhwc"),
                (3, (3, 3), (1, 1), (0, 1, 2, 0), "view"),
                (4, (5, 5), (2, 2), (1, 2, 1, 2), "nchw"),
                (1, (7, 2), (3, 1), (0, 0, 3, 3), "view"),
                (13, (1, 1), (1, 1), (0, 0, 0, 0), "nhwc"),
            ]
        ],
        dict(variant="fp16_*_generic_*", shape=(1, 3, 6, 6, 8), kernel=(3, 3), stride=(1, 1), padding=(1, 1, 1, 1), activation="relu6",
             special=[(NAN, (0, 1, 0, 0)), (INF, (0, 2, 5, 5))]),
        dict(variant="fp32_*_generic_*", shape=(1, 3, 6, 6, 8), kernel=(3, 3), stride=(1, 1), padding=(1, 1, 1, 1), epilogue="none"),
    ],
    "linear": [
        dict(variant="*_aligned_*", shape=(70, 264, 72)),
        dict(variant="*_generic_*", shape=(37, 71, 67), fp32_vectors=True),
        dict(variant="fp16_*", shape=(1, 40, 24), epilogue="none"),
        dict(variant="*_k?_*", shape=(35, 552, 72)),
        dict(variant="fp32_*", shape=(1, 40, 24), epilogue="bn", activation="relu6"),
        dict(variant="fp16_generic_*", shape=(3, 20, 5), special=[(NAN, (0, 3)), (INF, (1, 0))]),
    ],
    "narrow_weight": [
        dict(variant="*", shape=(37, 520), special=[(NAN, (1, 3)), (INF, (2, 300)), ("-inf", (3, 0))]),
        dict(variant="*", shape=(5, 8)),
    ],
    "fold_batch_norm": [
        dict(variant="*", shape=(37, 13, 3, 2), epilogue="bn"),
        dict(variant="*", shape=(5, 3, 3, 3), epilogue="bn", fp32_vectors=True, nhwc=True),
        dict(variant="*", shape=(40, 1, 5, 5), epilogue="bn", taps_first=True),
        dict(variant="*", shape=(3, 2, 1, 1), epilogue="bn", special=[(NAN, (0, 1, 0, 0)), (INF, (1, 0, 0, 0)), ("-inf", (2, 1, 0, 0))]),
    ],
}  # fmt: skip


@cache
def run(op):
    """One process runs all cases of an op."""
    cases = [{"op": op, **case} for case in CASES[op]]
    script = Path(__file__).with_name("interpreter.py")
    done = subprocess.run([sys.executable, script], input=json.dumps(cases), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "op, index",
    [
        pytest.param(op, index, marks=pytest.mark.xdist_group(f"interpreter_{op}"), id=f"{op}-{index}-{case['variant']}")
        for op, cases in CASES.items() for index, case in enumerate(cases)
    ],
)  # fmt: skip
def test_kernel(op, index):
    outcome = run(op)["outcomes"][index]
    assert outcome, f"no variant matches {CASES[op][index]['variant']}"
    wrong = {name: text for name, text in outcome.items() if text}
    assert not wrong, "\n\n".join(f"{op}/{name}: {CASES[op][index]}\n{text}" for name, text in wrong.items())


@pytest.mark.parametrize("op", [pytest.param(op, marks=pytest.mark.xdist_group(f"interpreter_{op}")) for op in CASES])
def test_every_variant_ran(op):
    assert set().union(*run(op)["outcomes"]) == set(run(op)["variants"][op])
