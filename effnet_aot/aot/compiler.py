"""Compiles one variant for one capability, in a process of its own, through a cache keyed by everything that matters."""

import hashlib
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

from .errors import BuildError

# PTX ISA of the images of 8.x capabilities: the oldest that serves them, so that drivers from CUDA 12.0 on take the PTX.
PTX_VERSION_8X = 80


def tool_versions():
    """Version of Triton and of the ptxas inside its wheel (the manifest records both, and the cache depends on both)."""
    import triton
    from triton import knobs

    return {"triton": triton.__version__, "ptxas": knobs.nvidia.ptxas.version}


def source_digest(source_dir, op):
    """Hash of the text that can change this op's code: its own file and the shared ones."""
    digest = hashlib.sha256()
    for path in sorted(source_dir.glob("_*.py")) + [source_dir / f"{op}.py"]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def cache_key(variant, capability, versions, digest):
    spec = {
        "source": digest, "op": variant.op, "kernel": variant.kernel.__name__, "capability": capability, "parameters": variant.parameters,
        "constants": variant.constants, "divisible": variant.divisible, "warps": variant.num_warps, "stages": variant.num_stages, **versions,
    }
    return hashlib.sha256(json.dumps(spec, sort_keys=False).encode()).hexdigest()[:32]


def compile_variant(variant, capability, path):
    """Writes path.cubin, path.ptx and path.json (what the compiler reports)."""
    # Line tables would triple the size and carry the build directory into the image.
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TRITON_CACHE_DIR"] = scratch
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

        constants = dict(variant.constants)
        if "DEPENDENT_LAUNCH" in variant.kernel.arg_names:  # see triton_src/_launch.py
            constants["DEPENDENT_LAUNCH"] = capability >= 90
        order = list(variant.parameters)
        source = (GluonASTSource if isinstance(variant.kernel, GluonJITFunction) else ASTSource)(
            fn=variant.kernel,
            signature={**variant.parameters, **{name: "constexpr" for name in constants}},
            constexprs=constants,
            attrs={(order.index(name),): [["tt.divisibility", multiple]] for name, multiple in variant.divisible.items()},
        )
        options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": True}
        if capability // 10 == 8:
            options["ptx_version"] = PTX_VERSION_8X
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    report = resources(compiled.asm["cubin"])
    report.update(shared=compiled.metadata.shared, threads=32 * compiled.metadata.num_warps, dependent_launch=constants.get("DEPENDENT_LAUNCH", False))
    write_atomically(path.with_suffix(".cubin"), compiled.asm["cubin"])
    write_atomically(path.with_suffix(".ptx"), compiled.asm["ptx"].encode())
    write_atomically(path.with_suffix(".json"), json.dumps(report).encode())


def resources(cubin):
    """Registers a thread and bytes of spilled registers, as the assembler allotted them."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    # These kernels have no local arrays, so a stack frame can only be spilled registers.
    return {"registers": int(re.search(r"REG:(\d+)", text)[1]), "spills": int(re.search(r"STACK:(\d+)", text)[1])}


def write_atomically(path, data):
    """A build that is interrupted, or a second one beside it, must not leave half an image in the cache."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    Path(file.name).replace(path)


def is_cached(path):
    return all(path.with_suffix(suffix).exists() for suffix in (".cubin", ".ptx", ".json"))


_variants = {}


def start_worker(source_dir, system_path):
    """In a worker process: imports the kernels once. Build isolation hides the path from children, so it is handed over."""
    import gc
    import sys

    gc.disable()  # a tenth of the time went into it, and what it would find of a kernel is a megabyte
    sys.path[:] = system_path
    from .discover import discover

    _variants.update({str(v): v for v in discover(source_dir) + discover(source_dir, candidates=True)})


def work(name, capability, path):
    """In a worker process: None, or the compiler's complaint."""
    try:
        compile_variant(_variants[name], capability, path)
    except Exception as error:  # Triton raises many kinds; all of them mean that this kernel does not compile
        raise BuildError(f"kernel {name} does not compile for capability {capability // 10}.{capability % 10}: {type(error).__name__}: {error}") from None
