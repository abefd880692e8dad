"""A deep product of a map's pixels and a few of a weight's rows: the inside of merged_depthwise.py and merged_pool.py.

The weight's rows, all of their depth, are fetched before the map is there. The pixels then come in parts of 64 channels through shared
memory, STAGES - 1 of them under way; those of a program's next image while this one's are multiplied.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from ._band import async_load

DEPTH = gl.constexpr(64)  # of a part
SWIZZLED = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))


@gluon.constexpr_function
def copies_layout(warps):
    return gl.BlockedLayout([1, 8], [4, 8], [warps, 1], [1, 0])


@gluon.constexpr_function
def products_layout(warps_m, warps_n):
    return gl.NVMMADistributedLayout([2, 0], [warps_m, warps_n], [16, 8])


@gluon.jit
def copy_part(rows, exists, first, in_channels, shared, loads: gl.constexpr):
    """The channels from `first` on of rows (pixels, or a weight's), on their way into shared memory, as one group."""
    c = first + gl.arange(0, DEPTH, layout=gl.SliceLayout(0, loads))
    async_load(shared, rows[:, None] + c[None, :], mask=exists[:, None] & (c < in_channels)[None, :])
    async_copy.commit_group()


@gluon.jit
def fetch_rows(weight, rows, exists, in_channels, PARTS: gl.constexpr, loads: gl.constexpr):
    """The weight's rows in parts, which are under way."""
    parts = ()
    for part in gl.static_range(PARTS):
        shared = gl.allocate_shared_memory(gl.float16, [rows.shape[0], DEPTH], SWIZZLED)
        copy_part(weight + rows * in_channels, exists, part * DEPTH, in_channels, shared, loads)
        parts = parts + (shared,)
    return parts


@gluon.jit
def fetch_map(pixels, exists, in_channels, PARTS: gl.constexpr, STAGES: gl.constexpr, loads: gl.constexpr):
    """The places for a map's parts, the first of which are under way."""
    slots = ()  # one by one: the compiler would put a barrier between copies to, or reads of, places of one allocation
    for _ in gl.static_range(STAGES):
        slots = slots + (gl.allocate_shared_memory(gl.float16, [pixels.shape[0], DEPTH], SWIZZLED),)
    for part in gl.static_range(min(STAGES - 1, PARTS)):
        copy_part(pixels, exists, part * DEPTH, in_channels, slots[part], loads)
    return slots


@gluon.jit
def multiply(slots, weights, pixels, exists, following, follows, in_channels, mma: gl.constexpr, loads: gl.constexpr):
    """(pixels, rows) of the products. The first parts of the image that is `following` are fetched, if it `follows`; both are None where a
    program has a single image."""
    PARTS: gl.constexpr = len(weights)
    STAGES: gl.constexpr = len(slots)
    gl.static_assert(follows is None or PARTS % STAGES == 0, "the next image begins in the first slot")
    AHEAD: gl.constexpr = min(STAGES - 1, PARTS)
    PIXELS: gl.constexpr = slots[0].shape[0]
    ROWS: gl.constexpr = weights[0].shape[0]
    SHORT: gl.constexpr = PIXELS * ROWS <= 16 * 32 * gl.num_warps()
    left_operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right_operand: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    value = gl.zeros([PIXELS, ROWS], gl.float32, layout=mma)
    other = value
    for part in gl.static_range(PARTS):
        async_copy.wait_group(AHEAD - 1 if follows is not None else min(AHEAD - 1, PARTS - 1 - part))
        if part + AHEAD < PARTS:
            copy_part(pixels, exists, (part + AHEAD) * DEPTH, in_channels, slots[(part + AHEAD) % STAGES], loads)
        elif follows is not None:
            copy_part(following, exists & follows, (part + AHEAD - PARTS) * DEPTH, in_channels, slots[(part + AHEAD) % STAGES], loads)
        left = slots[part % STAGES].load(left_operand)
        right = weights[part].permute((1, 0)).load(right_operand)
        # Of a small tile two sums in turns: a product waits for the one before it.
        if SHORT and part % 2:
            other = mma_v2(left, right, other)
        else:
            value = mma_v2(left, right, value)
    return value + other if SHORT else value
