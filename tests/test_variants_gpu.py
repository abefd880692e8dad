"""Every variant in the library on the GPU, with the image that serves it."""

import pytest
from stub_cuda import c_api
from variants import (
    BEGINNINGS, BLOCK_PADDINGS, BLOCKS, CONVOLUTIONS, EMBEDDED, GUARD, PROBLEMS, PROMISED, STEMS, WALKED, Target, check_infinity_in_a_convolution,
    check_infinity_in_a_walk, check_nan_and_infinity_in_a_beginning, check_nan_and_infinity_in_a_block, check_nan_and_infinity_in_a_stem,
    check_variant, check_weight_tap_by_tap, serves,
)  # fmt: skip

from effnet_aot import _library



TUNED = {"merged_depthwise", "merged_pool"}  # ops with kernels where a table names them, and else without


@pytest.fixture(scope="module")
def target():
    return Target(c_api.Library(str(_library.PATH)), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("op, variant", EMBEDDED, ids=["-".join(name) for name in EMBEDDED])
def test_variant(target, op, variant):
    check_variant(target, op, variant, guards=(GUARD, 0))  # without guards each tensor is alone in its allocation, for compute-sanitizer


@pytest.mark.gpu
@pytest.mark.parametrize("variant", BLOCKS)
@pytest.mark.parametrize("padding", BLOCK_PADDINGS)
def test_nan_and_infinity_in_a_block(target, variant, padding):
    check_nan_and_infinity_in_a_block(target, variant, padding)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", WALKED)
def test_infinity_in_a_walk(target, variant):
    check_infinity_in_a_walk(target, variant)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", WALKED)
def test_weight_tap_by_tap(target, variant):
    check_weight_tap_by_tap(target, variant)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", STEMS)
@pytest.mark.parametrize("padding", BLOCK_PADDINGS)
def test_nan_and_infinity_in_a_stem(target, variant, padding):
    check_nan_and_infinity_in_a_stem(target, variant, padding)


@pytest.mark.gpu
@pytest.mark.parametrize("op, variant", BEGINNINGS)
@pytest.mark.parametrize("padding", BLOCK_PADDINGS)
def test_nan_and_infinity_in_a_beginning(target, op, variant, padding):
    check_nan_and_infinity_in_a_beginning(target, op, variant, padding)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", CONVOLUTIONS)
def test_infinity_in_a_convolution(target, variant):
    check_infinity_in_a_convolution(target, variant)


@pytest.mark.gpu
def test_every_embedded_variant_is_tested(request, target):
    """By a test_variant of its own, in whichever process: the library has no variant that they do not know."""
    embedded = {(k.op.decode(), k.variant.decode()) for k in target.library.kernels() if serves({"kind": ("cubin", "ptx")[k.kind], "arch": str(k.capability)})}
    assert embedded and embedded == set(EMBEDDED)
    items = [item for item in request.session.items if getattr(item, "originalname", "") == "test_variant"]
    selected = {(item.callspec.params["op"], item.callspec.params["variant"]) for item in items}
    if selected != embedded:
        pytest.skip("not all of them were selected to run")


def test_every_op_has_problems():
    """A new op is not left out where there is no GPU to notice it."""
    embedded = {op for op, _ in EMBEDDED}
    assert embedded | TUNED == set(PROBLEMS) == set(PROMISED) == set(c_api.PROBLEMS)
