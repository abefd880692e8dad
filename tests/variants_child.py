"""Checks variants where this process's CUDA driver computes in host memory: the stub that executes PTX. A process of its own,
because the driver and the kind of image are chosen once a process. Names as JSON on stdin, what was wrong with each on stdout;
the library may be another than the package's."""

import json
import sys
import traceback

from stub_cuda import c_api
from variants import (
    FIRST_TWO, BLOCK_PADDINGS, GUARD, WALKED, Target, check_infinity_in_a_convolution, check_infinity_in_a_walk, check_nan_and_infinity_in_a_beginning,
    check_nan_and_infinity_in_a_block, check_nan_and_infinity_in_a_stem, check_variant, check_weight_tap_by_tap,
)  # fmt: skip

from effnet_aot import _library


def check(target, op, variant):
    try:
        check_variant(target, op, variant, guards=(GUARD,))
        for padding in BLOCK_PADDINGS if op == "mbconv" else ():
            check_nan_and_infinity_in_a_block(target, variant, padding)
        for padding in BLOCK_PADDINGS if op == "stem_mbconv" else ():
            check_nan_and_infinity_in_a_stem(target, variant, padding)
        for padding in BLOCK_PADDINGS if op in FIRST_TWO else ():
            check_nan_and_infinity_in_a_beginning(target, op, variant, padding)
        if op == "conv":
            check_infinity_in_a_convolution(target, variant)
        if op == "depthwise" and "_folded_" in variant:
            check_infinity_in_a_walk(target, variant)
        if op == "depthwise" and variant in WALKED:
            check_weight_tap_by_tap(target, variant)
    except AssertionError:
        return traceback.format_exc()


def main():
    target = Target(c_api.Library(sys.argv[1] if sys.argv[1:] else str(_library.PATH)), "cpu")
    print(json.dumps([check(target, op, variant) for op, variant in json.load(sys.stdin)]))


main()
