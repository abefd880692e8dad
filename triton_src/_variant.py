"""What one ahead-of-time compilation of a kernel is made of."""

from dataclasses import dataclass, field

# How a kernel's operands are stored and multiplied: the storage type and, for float32, the arithmetic of tl.dot.
PRECISIONS = {"fp16": ("fp16", "tf32"), "bf16": ("bf16", "tf32"), "tf32": ("fp32", "tf32"), "fp32": ("fp32", "ieee")}
# float32 and TF32 with narrow maps (_narrow.py): how x, the weight and the result are stored. Vectors and residuals are float32.
NARROW = {"narrowing": ("fp32", "fp32", "fp16"), "narrow": ("fp16", "fp32", "fp16"), "widening": ("fp16", "fp32", "fp32"), "widening16": ("fp16", "fp16", "fp32")}


def pointers(precision, names):
    """{name: Triton's type} of pointers."""
    if precision in NARROW:
        stored = dict(zip(("x", "weight", "out"), NARROW[precision]))
        return {name: f"*{stored.get(name, 'fp32')}" for name in names}
    return dict.fromkeys(names, f"*{PRECISIONS[precision][0]}")


@dataclass(frozen=True)
class Variant:
    """One kernel with everything fixed that the compiler must know.

    `parameters` maps the run-time parameters, in order, to Triton types; `divisible` promises that a parameter (an
    address or a number) is a multiple of something, which is what turns loads into 16-byte ones; `constants` are the
    constexprs. `attributes` are the integers by which the C++ side tells variants of an op apart.

    An op's variants() ship, and the C++ side chooses among them where the tuning table says nothing. Its candidates() are
    what tuning tries besides. `loads` counts the tensors that the innermost loop reads: from three on, registers are too
    dear for more than 4 warps and 2 stages. `base_warps` are those that a tile is compiled with first: a warp a split.
    `judged`: tuning leaves it out where the registers of its tile speak against its schedule.
    """

    op: str
    name: str
    kernel: object
    parameters: dict
    constants: dict
    attributes: dict
    divisible: dict = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    loads: int = 2
    base_warps: int = 4
    judged: bool = True

    @property
    def precision(self):
        return self.name.split("_")[0]

    def __str__(self):
        return f"{self.op}/{self.name}"


# The order is the one of `enum class Precision` in csrc/registry.h.
PRECISION_CODES = {"fp16": 0, "bf16": 1, "tf32": 2, "fp32": 3, "narrowing": 4, "narrow": 5, "widening": 6, "widening16": 7}

# (warps, stages) that a candidate's tile is tried with, where its registers allow; the first is the conservative one.
SCHEDULES = ((4, 2), (4, 3), (8, 2), (8, 3))


def tiles(rows, columns, depths, areas=(1024, 8192)):
    """(BLOCK_M, BLOCK_N, BLOCK_K) of all combinations whose output tile has so many elements."""
    return [(m, n, k) for m in rows for n in columns for k in depths if areas[0] <= m * n <= areas[1]]


# BLOCK_M, BLOCK_N, BLOCK_K, warps, stages of products with many rows, which the L2 cache bounds: the larger the tile, the less
# is read twice. Their accumulators alone take 64 to 128 registers a thread, and those are well spent.
LARGE_TILES = {
    "fp16": [(128, 128, 32, 4, 3), (128, 128, 32, 8, 3), (128, 128, 64, 4, 3), (128, 128, 64, 8, 3), (256, 128, 32, 8, 3), (128, 256, 32, 8, 3)],
    "tf32": [(128, 128, 32, 4, 3), (128, 128, 32, 8, 3), (256, 128, 32, 8, 3), (128, 256, 32, 8, 3)],
}  # fmt: skip
LARGE_TILES["bf16"] = LARGE_TILES["fp16"]
LARGE_TILES |= dict.fromkeys(("narrowing", "widening"), LARGE_TILES["tf32"]) | {"widening16": LARGE_TILES["fp16"]}


def split_schedules(precision):
    """What variant() takes for a product whose depth is split across the warps. For few rows and a deep product alone: a
    warp's tile is the program's, so larger ones are short of registers. A split's part of a row is 64 or 128 bytes."""
    shapes = [(16, 16, 64), (16, 16, 128), (16, 32, 64), (16, 32, 128), (16, 64, 64), (32, 16, 64), (32, 16, 128), (32, 32, 64)]
    size = {"fp16": 2, "bf16": 2, "tf32": 4, "widening": 4}.get(precision)
    for m, n, part in shapes if size else ():
        k = part // size
        for splits in (4, 8):
            for stages in (2, 3, 4):
                yield {"m": m, "n": n, "k": k, "warps": splits, "stages": stages, "schedule": f"w{splits}s{stages}_k{splits}_", "splits": splits}
