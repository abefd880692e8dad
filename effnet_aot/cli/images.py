"""The embedded images in words: what serves a device, and how many there are of what."""

from collections import Counter


def image_name(kernel):
    """"cubin sm_89" or "ptx compute_89", as the library names what serves a device."""
    capability = kernel["arch"].replace(".", "")
    return f"cubin sm_{capability}" if kernel["kind"] == "cubin" else f"ptx compute_{capability}"


def counts(kernels):
    return Counter(image_name(kernel) for kernel in kernels)


def span(values):
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"
