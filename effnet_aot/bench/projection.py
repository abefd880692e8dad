"""The time that a kernel would take on another GPU: a projection from counters, not a measurement.

What a kernel asks of a GPU is counted where it runs, with the code that the other GPU would run (its PTX): warp
instructions, tensor-core instructions, bytes through the L2 cache and through DRAM. Each divided by what the other GPU does
a second is the least time that it can take for that:

    issue   = instructions / (multiprocessors x 4 a cycle x clock)
    tensor  = tensor instructions x operations of one / rate
    l2      = L2 bytes / (multiprocessors x 64 B a cycle x clock)
    dram    = DRAM bytes / bandwidth

The lower bound is the largest of the four, with only those DRAM bytes that its L2 could not keep. For the expected time the
largest, with all DRAM bytes, is taken, and what on the measuring GPU none of its own limits explains is latency, which goes
with the clock:

    expected = max(issue, tensor, l2, dram) + (measured - max(busy share) x measured) x measuring clock / clock
"""

from dataclasses import dataclass

# Operations of one warp-wide mma.sync instruction: m16n8k16 in half precision, m16n8k8 in TF32.
TENSOR_OPERATIONS = {"float16": 4096, "bfloat16": 4096, "float32": 2048}
BUSY = ("issue_pct", "tensor_pct", "dram_pct", "l2_pct")


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: str
    multiprocessors: int
    clock: float  # Hz
    bandwidth: float  # bytes per second of DRAM
    l2: int  # bytes
    rates: dict  # dense tensor-core operations per second by dtype, float32 accumulation


GPUS = {"8.9": Gpu("NVIDIA GeForce RTX 4090", "8.9", 128, 2.52e9, 1008e9, 72 * 10**6, {"float16": 165.2e12, "bfloat16": 165.2e12, "float32": 82.6e12})}


def project(kernel, gpu, dtype):
    """{"bound_us", "expected_us", "limit"} of a kernel's counters."""
    dram = kernel.get("dram_read_bytes", 0) + kernel.get("dram_write_bytes", 0)
    cycles = gpu.multiprocessors * gpu.clock
    parts = {
        "issue": kernel["instructions"] / (4 * cycles),
        "tensor": kernel.get("tensor_instructions", 0) * TENSOR_OPERATIONS[dtype] / gpu.rates[dtype],
        "l2": kernel.get("l2_bytes", 0) / (64 * cycles),
    }
    bound = max(*parts.values(), max(0, dram - gpu.l2) / gpu.bandwidth)
    parts["dram"] = dram / gpu.bandwidth
    limit = max(parts, key=parts.get)
    measured, busy = kernel["ns"] / 1e9, max(kernel.get(name, 0) for name in BUSY) / 100
    latency = measured * max(0.0, 1 - busy) * kernel.get("cycles_per_s", gpu.clock) / gpu.clock
    return {"bound_us": 1e6 * bound, "expected_us": 1e6 * (parts[limit] + latency), "limit": limit if parts[limit] > latency else "latency"}


def network(kernels, unfused, gpu, dtype):
    """Both networks' kernels with their projections, the sums, and the ratios unfused / ours."""
    rows = {name: [{**kernel, **project(kernel, gpu, dtype)} for kernel in found] for name, found in (("ours", kernels), ("unfused", unfused))}
    sums = {name: {key: sum(row[key] for row in found) for key in ("bound_us", "expected_us")} for name, found in rows.items()}
    for name, found in rows.items():
        sums[name]["measuring_us"] = sum(row["ns"] for row in found) / 1e3
    ratios = {key: sums["unfused"][key] / sums["ours"][key] for key in sums["ours"]}
    return {"projection": True, "onto": gpu.name, "kernels": rows["ours"], "unfused_kernels": rows["unfused"], "sums": sums, "ratios": ratios}
