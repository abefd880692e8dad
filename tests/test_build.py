"""The build: kernels are embedded, each fits the GPU it is for, two builds agree, and what cannot be built says so."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

import effnet_aot
from effnet_aot import _C
from effnet_aot.aot import BuildError, build_kernels, parse_archs

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(effnet_aot.__file__).parent
LIBRARY = PACKAGE / "lib" / "libeffnet_aot.so"


@pytest.fixture(scope="module")
def images():
    return json.loads((PACKAGE / "manifest.json").read_text())["images"]


def name_of(image):
    return f"{image['op']}/{image['variant']} for {image['arch']} ({image['kind']})"


# What is embedded


def test_kernels_are_embedded(images):
    """First of all: a package without kernels would pass every test of its CPU ops."""
    variants = defaultdict(set)
    for image in images:
        variants[image["arch"], image["kind"]].add((image["op"], image["variant"]))
    assert ("8.9", "cubin") in variants
    assert [kind for _, kind in variants].count("ptx") == 1, "exactly one PTX, the fallback of GPUs without a cubin"
    first = next(iter(variants.values()))
    assert {op for op, _ in first} == {"conv", "depthwise", "expand_depthwise", "fold_batch_norm", "linear", "mbconv", "merge_weights", "merged_depthwise", "merged_pool", "narrow_weight", "pointwise", "pointwise_pool", "stem_mbconv"}
    assert all(other == first for other in variants.values()), "every target has every variant"
    assert sum(map(len, variants.values())) == len(images), "no variant is there twice"


def test_embedded_bytes_are_those_of_the_manifest(images):
    for index, image in enumerate(images):
        data = _C.image(index)
        assert len(data) == image["bytes"], name_of(image)
        assert hashlib.sha256(data).hexdigest() == image["sha256"], name_of(image)


def test_kernels_agree_with_the_manifest(images):
    assert effnet_aot.kernels() == [{field: image[field] for field in image if field not in ("parameters", "dependent_launch")} for image in images]


# Every sm_89 image fits an RTX 4090


def test_sm_89_cubins_fit(images):
    """0 spills; shared memory within the 99 KiB that a block may have; registers within the SM's 64 K."""
    for image in images:
        if (image["arch"], image["kind"]) != ("8.9", "cubin"):
            continue
        # The hardware hands out registers to a warp in units of 256.
        registers = -(-image["registers"] * 32 // 256) * 256 * image["threads"] // 32
        assert image["spills"] == 0, f"{name_of(image)} spills {image['spills']} bytes"
        assert image["shared"] <= 99 * 1024, f"{name_of(image)} wants {image['shared']} bytes of shared memory"
        assert registers <= 64 * 1024, f"{name_of(image)} wants {registers} registers"
        assert image["threads"] <= 1024


# What the library asks of its surroundings


def undefined_symbols(path):
    lines = subprocess.run(["nm", "-D", "--undefined-only", path], check=True, capture_output=True, text=True).stdout.splitlines()
    return [line.split()[-1] for line in lines if line.split()[0] != "w"]


def dynamic_section(path, tag):
    text = subprocess.run(["readelf", "-dW", path], check=True, capture_output=True, text=True).stdout
    return re.findall(rf"\({tag}\).*\[(.*)\]", text)


RUNTIME = {"libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "ld-linux-x86-64.so.2"}


def test_library_needs_the_stable_abi_alone():
    """No at::, c10::, cuda*, cu* or Py* symbol: nothing but torch's C functions and the C/C++ runtime (versioned symbols)."""
    foreign = [s for s in undefined_symbols(LIBRARY) if "@" not in s and not s.startswith(("aoti_torch_", "torch_"))]
    assert foreign == []
    assert set(dynamic_section(LIBRARY, "NEEDED")) <= RUNTIME | {"libtorch_cpu.so"}
    assert dynamic_section(LIBRARY, "SONAME") == ["libeffnet_aot.so"]
    assert dynamic_section(LIBRARY, "RPATH") == dynamic_section(LIBRARY, "RUNPATH") == []


def test_library_for_c_needs_the_runtime_alone():
    """No symbol of torch or CUDA: the C/C++ runtime, in versioned symbols."""
    library = LIBRARY.with_name("libeffnet_aot_c.so")
    assert [s for s in undefined_symbols(library) if "@" not in s] == []
    assert set(dynamic_section(library, "NEEDED")) <= RUNTIME
    assert dynamic_section(library, "SONAME") == ["libeffnet_aot_c.so"]
    assert dynamic_section(library, "RPATH") == dynamic_section(library, "RUNPATH") == []


def test_torch_abi_audit():
    """The tool's own judgement; it also knows since when torch has had each function that the library calls."""
    pytest.importorskip("torch_abi_audit")
    command = [sys.executable, "-m", "torch_abi_audit.cli", str(PACKAGE), "--json", "--check", "torch"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout)
    libraries = {Path(entry["path"]).name: entry["torch"] for entry in report["extensions"] + report["bundled_libs"]}
    modules = [libraries.pop(name) for name in list(libraries) if name.startswith("_C.")]  # a checkout has one for each Python that it was installed with
    library = libraries.pop("libeffnet_aot.so")
    assert modules and not any(module["uses_torch"] for module in modules)
    assert not libraries.pop("libeffnet_aot_c.so")["uses_torch"] and not libraries
    assert library["stable"] and library["unknown_shim_symbols"] == []
    assert library["min_torch_version"] == f"{_C.build_info()['torch_target']}.0"


def test_module_finds_the_library_beside_it():
    (module,) = PACKAGE.glob(f"_C.{sys.implementation.cache_tag}*.so")
    assert set(dynamic_section(module, "NEEDED")) <= RUNTIME | {"libeffnet_aot.so"}
    assert dynamic_section(module, "RPATH") + dynamic_section(module, "RUNPATH") == ["$ORIGIN/lib"]


# What must not be built

DOUBLE = '''
import triton
import triton.language as tl

from ._variant import Variant


@triton.jit
def effnet_double(x, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, 2 * tl.load(x + at, mask=at < count), mask=at < count)


def variants():
    for block in SIZES:
        yield Variant(op="double", name=f"block{block}", kernel=effnet_double, parameters={"x": "*fp32", "count": "i32"},
                      constants={"BLOCK": block}, attributes={"block": block})
'''


def kernel_sources(folder, sizes):
    """A triton_src with one small op; `sizes` that are no power of two do not compile."""
    folder.mkdir(parents=True)
    for name in ("__init__.py", "_variant.py"):
        shutil.copy(ROOT / "triton_src" / name, folder)
    (folder / "double.py").write_text(DOUBLE.replace("SIZES", repr(sizes)))
    return folder


@pytest.mark.parametrize("found, expected", [
    ([], ["sm_89 cubin", "compute_89 ptx"]),
    ([(9, 0), (8, 9), (9, 0)], ["sm_89 cubin", "sm_90 cubin", "compute_89 ptx"]),
    ([(7, 5), (8, 0)], ["sm_80 cubin", "sm_89 cubin", "compute_89 ptx"]),  # 7.5 is not supported
])  # fmt: skip
def test_default_architectures(monkeypatch, found, expected):
    """8.9, the GPUs of the building machine, and one PTX for those to come."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found[device])
    assert list(map(str, parse_archs(None))) == list(map(str, parse_archs(""))) == expected


@pytest.mark.parametrize("archs", ["7.3", "8.9 7.3", "sm_89", "8.9,all"])
def test_unknown_architecture(archs):
    unknown = archs.split()[-1].split(",")[-1]
    with pytest.raises(BuildError, match=re.escape(f"EFFNET_AOT_ARCHS: unknown architecture '{unknown}'")):
        parse_archs(archs)


def test_kernel_that_does_not_compile_is_named(tmp_path):
    source = kernel_sources(tmp_path / "failing_kernels", [64, 100])
    with pytest.raises(BuildError, match=r"double/block100 does not compile for capability 8\.9"):
        build_kernels(tmp_path / "out", tmp_path / "cache", "8.9", jobs=1, quiet=True, source_dir=source)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_no_kernels(tmp_path):
    source = kernel_sources(tmp_path / "no_kernels", [])
    with pytest.raises(BuildError, match="no kernels: .*no_kernels"):
        build_kernels(tmp_path / "out", tmp_path / "cache", "8.9", jobs=1, quiet=True, source_dir=source)


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs a checkout")
def test_setup_stops_with_the_message(tmp_path):
    command = [sys.executable, "setup.py", "build_ext", f"--build-temp={tmp_path}/temp", f"--build-lib={tmp_path}/lib"]
    environment = {**os.environ, "EFFNET_AOT_ARCHS": "7.3", "EFFNET_AOT_CACHE": str(tmp_path / "cache")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "error: EFFNET_AOT_ARCHS: unknown architecture '7.3'" in result.stderr
    assert "Traceback" not in result.stderr


# Two builds


def test_builds_in_two_folders_are_identical(tmp_path):
    """Images and manifest, bit for bit. In processes of their own: both folders hold a package of the same name."""
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); from aot import build_kernels\n"
        "here = Path('triton_src').resolve()\n"
        "build_kernels('out', 'cache', '8.9', jobs=1, quiet=True, source_dir=here)"
    )
    for folder in (tmp_path / "one", tmp_path / "another" / "deeper"):
        kernel_sources(folder / "triton_src", [64, 128])
        subprocess.run([sys.executable, "-c", script, str(ROOT / "effnet_aot")], cwd=folder, check=True)
        for name in ("images.bin", "manifest.json", "registry.cpp"):
            assert (folder / "out" / name).read_bytes() == (tmp_path / "one" / "out" / name).read_bytes(), name


def test_nothing_compiles_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "")  # as good as unset
    source = kernel_sources(tmp_path / "cached_kernels", [64])
    build = lambda: build_kernels(tmp_path / "out", tmp_path / "cache", "8.9", quiet=True, source_dir=source)  # noqa: E731
    first, written = build(), (tmp_path / "out" / "registry.cpp").stat().st_mtime_ns
    assert first.compiled == 1, "a cubin and the PTX of one capability come out of one compilation"
    assert build().compiled == 0
    assert (tmp_path / "out" / "registry.cpp").stat().st_mtime_ns == written, "the C++ build has nothing to do"
