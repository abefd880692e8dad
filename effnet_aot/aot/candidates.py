"""Which of the candidates are worth compiling and measuring, by what the compiler says of them.

A kernel that leaves registers unused can afford more warps and deeper prefetching; one that is short of them loses by
both. So every tile is compiled with 4 warps (split ones: a warp a split) and 2 stages first, and the registers of that
decide what else is tried.
"""

SPARE, SCARCE = 96, 128  # registers a thread
MANY_LOADS = 3
# Bytes of shared memory that a block may have, by capability. PTX must fit the smallest GPU that it may serve.
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


def fits(target, report):
    limit = 1024 * (SHARED[target.capability] if target.kind == "cubin" else min(SHARED.values()))
    allotted = -(-report["registers"] * 32 // 256) * 256 * report["threads"] // 32  # a warp's registers come in units of 256
    return report["spills"] == 0 and report["shared"] <= limit and allotted <= 64 * 1024 and report["threads"] <= 1024


def is_conservative(variant):
    return variant.num_warps <= variant.base_warps and variant.num_stages <= 2


def tile(variant):
    """What the schedules of one tile have in common."""
    constants = (*variant.constants.items(), *variant.divisible.items(), *variant.parameters.items())
    return variant.op, variant.kernel.__name__, constants


def admits(variant, registers):
    """Whether the variant is worth trying, where its tile with the base warps and 2 stages takes so many registers (None: spills)."""
    if is_conservative(variant) or not variant.judged:
        return True
    if registers is None or registers > SCARCE or variant.loads >= MANY_LOADS:
        return False
    return registers < SPARE or variant.num_warps <= variant.base_warps
