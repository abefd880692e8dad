"""The C API: its header, what it refuses, and the example in plain C. What it launches is in test_launcher.py."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import stub_cuda
from stub_cuda import c_api
from stub_cuda.c_api import INVALID_ARGUMENT, OK
from test_launcher import BIAS, DEPTHWISE_BIAS, EXPAND_BIAS, MEAN, MERGED, NARROW_WEIGHTS, OUT, OUT_BIAS, PROBLEMS, PROJECT, RESIDUAL, SCALE, VAR, WORKSPACE, X, both, launch

import effnet_aot

pytestmark = pytest.mark.xdist_group("stub_cuda")

INCLUDE = stub_cuda.ROOT / "csrc" / "include"
EXAMPLE = stub_cuda.ROOT / "examples" / "c"
CC = os.environ.get("CC", "gcc")


# ---- the header ----


@pytest.mark.parametrize("compiler, standard", [(CC, "c99"), (CC, "c11"), (stub_cuda.CXX, "c++11"), (stub_cuda.CXX, "c++20")])
def test_header_compiles_alone(tmp_path, compiler, standard):
    source = tmp_path / ("a.cpp" if "++" in standard else "a.c")
    source.write_text("#include <effnet_aot/c_api.h>\nint main(void) { return effnet_kernel_count() == 0; }\n")
    subprocess.run([compiler, f"-std={standard}", "-pedantic", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{INCLUDE}", source], check=True)


def test_structs_are_those_of_the_ctypes_mirror(tmp_path):
    lines = []
    for struct in c_api.STRUCTS:
        name = struct.__name__
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        lines += [f'printf("{name}.{field} %zu\\n", offsetof({name}, {field}));' for field, _ in struct._fields_]
    source = tmp_path / "layout.c"
    source.write_text("#include <effnet_aot/c_api.h>\n#include <stdio.h>\nint main(void) {\n" + "\n".join(lines) + "\nreturn 0;\n}\n")
    subprocess.run([CC, "-std=c99", f"-I{INCLUDE}", source, "-o", tmp_path / "layout"], check=True)
    printed = dict(line.split() for line in subprocess.run(tmp_path / "layout", capture_output=True, text=True, check=True).stdout.splitlines())
    expected = {}
    for struct in c_api.STRUCTS:
        expected[struct.__name__] = str(ctypes.sizeof(struct))
        expected |= {f"{struct.__name__}.{field}": str(getattr(struct, field).offset) for field, _ in struct._fields_}
    assert printed == expected


C_LIBRARY = Path(stub_cuda._library.PATH).with_name("libeffnet_aot_c.so")


@pytest.mark.parametrize("library", [stub_cuda._library.PATH, C_LIBRARY], ids=lambda path: path.name)
def test_library_exports_what_the_header_declares(library):
    declared = set(re.findall(r"^EFFNET_API .*?(effnet_\w+)\(", INCLUDE.joinpath("effnet_aot/c_api.h").read_text(), re.MULTILINE))
    symbols = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    assert len(declared) == 21
    assert {line.split()[-1] for line in symbols.splitlines() if " T effnet_" in line} == declared


# ---- what it refuses ----

TOO_LARGE = 2**31
REFUSED = [
    # op, what differs, the message after "effnet_launch_<op>: "
    ("pointwise", {"struct_size": 16}, f"effnet_pointwise->struct_size must be sizeof(effnet_pointwise) = {ctypes.sizeof(c_api.Pointwise)}, got 16"),
    ("pointwise", {"struct_size": 2**40}, f"effnet_pointwise->struct_size must be sizeof(effnet_pointwise) = {ctypes.sizeof(c_api.Pointwise)}, got {2**40}"),
    ("pointwise", {"beyond": [0] * 8 + [1]},
     f"effnet_pointwise must use no members beyond the {ctypes.sizeof(c_api.Pointwise)} bytes that this library knows, got a value in byte {ctypes.sizeof(c_api.Pointwise) + 8}"),
    ("pointwise", {"precision": 5}, "precision must be from 0 to 3, got 5"),
    ("pointwise_pool", {"precision": 6}, "precision must be from 0 to 3, got 6"),
    ("pointwise", {"precision": c_api.NARROWING, "residual": RESIDUAL}, "residual must be null with EFFNET_NARROWING, got an address"),
    ("pointwise", {"precision": c_api.WIDENING16}, "weight_scale must not be null, got null"),
    ("pointwise", {"weight_scale": BIAS}, "weight_scale must be null where precision is not EFFNET_WIDENING16, got an address"),
    ("depthwise", {"precision": 4}, "precision must be from 0 to 3, got 4"),
    ("narrow_weight", {"rows": 0}, "rows must be from 1 to 2147483647, got 0"),
    ("narrow_weight", {"depth": TOO_LARGE}, "depth must be from 1 to 2147483647, got 2147483648"),
    ("narrow_weight", {"rows": 2**20, "depth": 2**11}, "weight must have at most 2147483647 elements, got 2147483648"),
    ("narrow_weight", {"weight": None}, "weight must not be null, got null"),
    ("narrow_weight", {"taps_first": 2}, "taps_first must be from 0 to 1, got 2"),
    ("narrow_weight", {"out": None}, "out must not be null, got null"),
    ("narrow_weight", {"scale": None}, "scale must not be null, got null"),
    ("pointwise", {"layout": -1}, "layout must be from 0 to 1, got -1"),
    ("pointwise", {"x": None}, "x must not be null, got null"),
    ("pointwise", {"weight": None}, "weight must not be null, got null"),
    ("pointwise", {"out": None}, "out must not be null, got null"),
    ("pointwise", {"x": X + 1}, "x must be aligned to its elements of 2 bytes, got an address that is not"),
    ("pointwise", {"residual": RESIDUAL + 1}, "residual must be aligned to its elements of 2 bytes, got an address that is not"),
    ("pointwise", {"batch": -1}, "batch must be from 0 to 2147483647, got -1"),
    ("pointwise", {"height": 0}, "height must be from 1 to 2147483647, got 0"),
    ("pointwise", {"width": -3}, "width must be from 1 to 2147483647, got -3"),
    ("pointwise", {"in_channels": 0}, "in_channels must be from 1 to 2147483647, got 0"),
    ("pointwise", {"out_channels": TOO_LARGE}, "out_channels must be from 1 to 2147483647, got 2147483648"),
    ("pointwise", {"batch": 2**20, "in_channels": 2**11, "height": 1, "width": 1}, "x must have at most 2147483647 elements, got 2147483648"),
    ("pointwise", {"out_channels": 2**25, "height": 1, "width": 1, "in_channels": 64}, "weight must have at most 2147483647 elements, got 2147483648"),
    ("pointwise", {"batch": 2**20, "out_channels": 2**11, "height": 1, "width": 1}, "out must have at most 2147483647 elements, got 2147483648"),
    ("pointwise", {"batch": 2**30, "height": 2**30, "width": 2**30}, f"x must have at most 2147483647 elements, got {2**63 - 1}"),
    ("pointwise", {"epilogue": {"struct_size": 8}}, f"epilogue->struct_size must be sizeof(epilogue) = {ctypes.sizeof(c_api.Epilogue)}, got 8"),
    ("pointwise", {"epilogue": {"activation": 3}}, "epilogue->activation must be from 0 to 2, got 3"),
    ("pointwise", {"epilogue": {"vectors_are_fp32": 2}}, "epilogue->vectors_are_fp32 must be from 0 to 1, got 2"),
    ("pointwise", {"epilogue": {"bias": BIAS + 2, "vectors_are_fp32": 1}}, "epilogue->bias must be aligned to its elements of 4 bytes, got an address that is not"),
    ("pointwise", {"epilogue": {"bn_weight": SCALE, "bn_bias": BIAS, "bn_mean": MEAN}}, "epilogue->bn_var must not be null, got null"),
    ("pointwise", {"epilogue": {"bn_var": VAR}}, "epilogue->bn_weight must not be null, got null"),
    ("pointwise", {"epilogue": {"bias": BIAS, "bn_weight": SCALE}}, "epilogue->bias must be null beside batch norm, got both"),
    ("pointwise", {"epilogue": {"bn_weight": SCALE, "bn_bias": BIAS, "bn_mean": MEAN, "bn_var": VAR, "bn_eps": -1.0}}, "epilogue->bn_eps must be at least 0, got -1.000000"),
    ("pointwise", {"epilogue": {"bn_weight": SCALE, "bn_bias": BIAS, "bn_mean": MEAN, "bn_var": VAR, "bn_eps": float("nan")}}, "epilogue->bn_eps must be at least 0, got nan"),
    ("pointwise_pool", {"residual": RESIDUAL}, "residual must be null, got an address"),
    ("pointwise_pool", {"width": 0}, "width must be from 1 to 2147483647, got 0"),
    ("depthwise", {"channels": 0}, "channels must be from 1 to 2147483647, got 0"),
    ("depthwise", {"kernel": 4}, "kernel must be 3 or 5, got 4"),
    ("depthwise", {"stride_y": 3}, "stride_y must be from 1 to 2, got 3"),
    ("depthwise", {"stride_x": 0}, "stride_x must be from 1 to 2, got 0"),
    ("depthwise", {"left": -1}, "left must be from 0 to 2147483647, got -1"),
    ("depthwise", {"height": 1, "top": 0, "bottom": 1}, "padded height must be from 3 to 2147483647, got 2"),
    ("depthwise", {"right": 2147483647}, "padded width must be from 3 to 2147483647, got 2147483655"),
    ("depthwise", {"bottom": 2**29}, "out must have at most 2147483647 elements, got 120259086080"),
    ("depthwise", {"x": None}, "x must not be null, got null"),
    ("conv", {"kernel_y": 0}, "kernel_y must be from 1 to 2147483647, got 0"),
    ("conv", {"kernel_x": 10}, "padded width must be from 10 to 2147483647, got 9"),
    ("conv", {"stride_y": 0}, "stride_y must be from 1 to 2147483647, got 0"),
    ("conv", {"top": 2**31}, "top must be from 0 to 2147483647, got 2147483648"),
    ("conv", {"x_strides": [1, 2, 3, -1]}, "x_strides must be from 0 to 2147483647, got -1"),
    ("conv", {"x_strides": [2147483647, 1, 1, 1]}, "x_strides must reach no element beyond 2147483647, got 2147483663"),
    ("conv", {"weight_strides": [1, 2**31, 1, 1]}, "weight_strides must be from 0 to 2147483647, got 2147483648"),
    ("conv", {"out": None}, "out must not be null, got null"),
    ("linear", {"rows": -1}, "rows must be from 0 to 2147483647, got -1"),
    ("linear", {"in_features": 0}, "in_features must be from 1 to 2147483647, got 0"),
    ("linear", {"out_features": 0}, "out_features must be from 1 to 2147483647, got 0"),
    ("linear", {"rows": 2**25}, "x must have at most 2147483647 elements, got 2147483648"),
    ("fold_batch_norm", {"precision": 4}, "precision must be from 0 to 3, got 4"),
    ("fold_batch_norm", {"out_precision": -1}, "out_precision must be from 0 to 3, got -1"),
    ("fold_batch_norm", {"precision": c_api.BF16}, "out_precision must be precision where that is not FP32, got 0"),
    ("fold_batch_norm", {"out_channels": 0}, "out_channels must be from 1 to 2147483647, got 0"),
    ("fold_batch_norm", {"in_channels": 0}, "in_channels must be from 1 to 2147483647, got 0"),
    ("fold_batch_norm", {"kernel_y": 0}, "kernel_y must be from 1 to 2147483647, got 0"),
    ("fold_batch_norm", {"kernel_x": TOO_LARGE}, "kernel_x must be from 1 to 2147483647, got 2147483648"),
    ("fold_batch_norm", {"out_channels": 2**20, "in_channels": 2**11}, "weight must have at most 2147483647 elements, got 19327352832"),
    ("fold_batch_norm", {"taps_first": 2}, "taps_first must be from 0 to 1, got 2"),
    ("fold_batch_norm", {"taps_first": 1}, "in_channels must be 1 with taps_first, got 24"),
    ("fold_batch_norm", {"epilogue": None}, "epilogue must have a batch norm, got none"),
    ("fold_batch_norm", {"epilogue": {"bias": BIAS}}, "epilogue must have a batch norm, got none"),
    ("fold_batch_norm", {"epilogue": PROBLEMS["fold_batch_norm"]["epilogue"] | {"activation": 1}}, "epilogue->activation must be EFFNET_LINEAR, got 1"),
    ("fold_batch_norm", {"weight_strides": [1, 2**31, 1, 1]}, "weight_strides must be from 0 to 2147483647, got 2147483648"),
    ("fold_batch_norm", {"weight": None}, "weight must not be null, got null"),
    ("fold_batch_norm", {"weight": X + 2}, "weight must be aligned to its elements of 4 bytes, got an address that is not"),
    ("fold_batch_norm", {"out": OUT + 1}, "out must be aligned to its elements of 2 bytes, got an address that is not"),
    ("fold_batch_norm", {"out_bias": OUT_BIAS + 2}, "out_bias must be aligned to its elements of 4 bytes, got an address that is not"),
    ("expand_depthwise", {"precision": 7}, "precision must be from 0 to 3, got 7"),
    ("expand_depthwise", {"kernel": 7}, "kernel must be 3 or 5, got 7"),
    ("expand_depthwise", {"batch": 2**19}, "expanded x must have at most 2147483647 elements, got 3170893824"),
    ("expand_depthwise", {"expand_weight": None}, "expand_weight must not be null, got null"),
    ("expand_depthwise", {"depthwise_bias": DEPTHWISE_BIAS + 2}, "depthwise_bias must be aligned to its elements of 4 bytes, got an address that is not"),
    ("expand_depthwise", {"workspace": WORKSPACE + 1}, "workspace must be aligned to its elements of 2 bytes, got an address that is not"),
    ("mbconv", {"precision": 7}, "precision must be from 0 to 3, got 7"),
    ("mbconv", {"hidden": 0}, "hidden must be from 1 to 2147483647, got 0"),
    ("mbconv", {"kernel": 7}, "kernel must be 3 or 5, got 7"),
    ("mbconv", {"stride_y": 3}, "stride_y must be from 1 to 2, got 3"),
    ("mbconv", {"height": 1, "top": 0, "bottom": 1}, "padded height must be from 3 to 2147483647, got 2"),
    ("mbconv", {"expand_weight": None}, "expand_bias must be null where expand_weight is, got an address"),
    ("mbconv", {"expand_weight": None, "expand_bias": None}, "hidden must be in_channels, 16, where expand_weight is null, got 96"),
    ("mbconv", {"batch": 2**19}, "expanded x must have at most 2147483647 elements, got 3170893824"),
    ("mbconv", {"bottom": 2**22}, "filtered x must have at most 2147483647 elements, got 5637155328"),
    ("mbconv", {"biases_are_fp32": 2}, "biases_are_fp32 must be from 0 to 1, got 2"),
    ("mbconv", {"depthwise_taps_first": -1}, "depthwise_taps_first must be from 0 to 1, got -1"),
    ("mbconv", {"activation": 3}, "activation must be from 0 to 2, got 3"),
    ("mbconv", {"x": None}, "x must not be null, got null"),
    ("mbconv", {"depthwise_weight": None}, "depthwise_weight must not be null, got null"),
    ("mbconv", {"project_weight": PROJECT + 1}, "project_weight must be aligned to its elements of 2 bytes, got an address that is not"),
    ("mbconv", {"expand_bias": EXPAND_BIAS + 2}, "expand_bias must be aligned to its elements of 4 bytes, got an address that is not"),
    ("mbconv", {"residual": RESIDUAL + 1}, "residual must be aligned to its elements of 2 bytes, got an address that is not"),
    ("mbconv", {"workspace": WORKSPACE + 1}, "workspace must be aligned to its elements of 2 bytes, got an address that is not"),
    ("linear", {"x": X + 1}, "x must be aligned to its elements of 2 bytes, got an address that is not"),
    ("merge_weights", {"precision": 2}, "precision must be EFFNET_FP16 or EFFNET_FP32, got 2"),
    ("merge_weights", {"depth": 0}, "depth must be from 1 to 2147483647, got 0"),
    ("merge_weights", {"rows": 2**20, "columns": 2**11}, "out must have at most 2147483647 elements, got 2147483648"),
    ("merge_weights", {"second": None}, "second must not be null, got null"),
    ("merge_weights", {"first_bias": None}, "first_bias must not be null, got null"),
    ("merge_weights", {"out_bias": OUT_BIAS + 2}, "out_bias must be aligned to its elements of 4 bytes, got an address that is not"),
    ("mbconv", {"narrow_project_weight": PROJECT}, "narrow weights must be null where precision is not EFFNET_TF32, got an address"),
    ("mbconv", {"precision": 2, "narrow_project_weight": PROJECT}, "narrow_depthwise_weight must not be null, got null"),
    ("mbconv", {"precision": 2} | NARROW_WEIGHTS | {"narrow_project_scale": None}, "narrow_project_scale must not be null, got null"),
    ("mbconv", {"precision": 2} | NARROW_WEIGHTS | {"narrow_depthwise_scale": SCALE + 2}, "narrow_depthwise_scale must be aligned to its elements of 4 bytes, got an address that is not"),
    ("expand_depthwise", {"expand_scale": SCALE}, "expand_scale must be null, got an address"),
    ("merged_depthwise", {"precision": 1}, "precision must be EFFNET_FP16 or EFFNET_TF32, got 1"),
    ("merged_depthwise", {"layout": 0}, "layout must be EFFNET_NHWC, got 0"),
    ("merged_depthwise", {"expand_scale": None}, "expand_scale must not be null, got null"),
    ("merged_depthwise", {"precision": 2, "x": X + 1}, "x must be aligned to its elements of 2 bytes, got an address that is not"),
    ("merged_depthwise", {"kernel": 4}, "kernel must be 3 or 5, got 4"),
    ("merged_pool", {"precision": 3}, "precision must be EFFNET_FP16 or EFFNET_TF32, got 3"),
    ("merged_pool", {"layout": 0}, "layout must be EFFNET_NHWC, got 0"),
    ("merged_pool", {"epilogue": None}, "epilogue must have a bias, got none"),
    ("merged_pool", {"epilogue": PROBLEMS["fold_batch_norm"]["epilogue"]}, "epilogue must have a bias, got batch norm"),
    ("merged_pool", {"epilogue": {"bias": BIAS}}, "epilogue->vectors_are_fp32 must be 1, got 0"),
    ("merged_pool", {"residual": RESIDUAL}, "residual must be null, got an address"),
    ("merged_pool", {"weight_scale": None}, "weight_scale must not be null, got null"),
    ("merged_pool", {"weight": None}, "weight must not be null, got null"),
]  # fmt: skip


def test_bad_arguments(stub):
    run = stub.run(*[["launch", op, (PROBLEMS | MERGED)[op] | changes] for op, changes, _ in REFUSED])
    assert [r["error"] for r in run.results] == [f"effnet_launch_{op}: {message}" for op, _, message in REFUSED]
    assert {r["status"] for r in run.results} == {INVALID_ARGUMENT}
    assert run.records == []  # not even the driver was opened


def test_workspace(stub):
    """Only where it is needed; and it is needed where mbconv_workspace says so."""
    steps = PROBLEMS["mbconv"] | {"workspace": None, "kernel": 5}
    run = stub.run(
        launch("mbconv", workspace=None), ["launch", "mbconv", steps], ["workspace", "mbconv", steps],
        ["workspace", "mbconv", PROBLEMS["mbconv"], 0, True], ["workspace", "mbconv", None], ["workspace", "mbconv", steps | {"x": X + 1}],
    )  # fmt: skip
    assert [r["status"] for r in run.results] == [OK, INVALID_ARGUMENT, OK, *3 * [INVALID_ARGUMENT]]
    assert run.results[1]["error"] == f"effnet_launch_mbconv: workspace must have {run.results[2]['value']} bytes, see effnet_mbconv_workspace(), got null"
    assert run.results[3]["error"] == "effnet_mbconv_workspace: bytes must not be null, got null"
    assert run.results[4]["error"] == "effnet_mbconv_workspace: effnet_mbconv must not be null, got null"
    assert run.results[5]["error"] == "effnet_mbconv_workspace: x must be aligned to its elements of 2 bytes, got an address that is not"
    assert len(run.launches) == 1


def test_null_problems(stub):
    run = stub.run(*[["launch", op, None] for op in c_api.PROBLEMS])
    structs = [struct.__name__ for struct in c_api.PROBLEMS.values()]
    assert [r["error"] for r in run.results] == [f"effnet_launch_{op}: {struct} must not be null, got null" for op, struct in zip(c_api.PROBLEMS, structs)]


def test_nothing_to_do(stub):
    addresses = ("x", "out", "weight", "depthwise_weight", "project_weight", "workspace")

    def nothing(op):
        return {name: None for name in addresses if name in PROBLEMS[op]} | ({"rows": 0} if op == "linear" else {"batch": 0})

    ops = [op for op in PROBLEMS if op not in ("fold_batch_norm", "merge_weights", "narrow_weight", "stem_mbconv")]  # the first three always have a weight
    calls = [launch(op, **nothing(op)) for op in ops] + [["launch", "stem_mbconv", both(nothing("conv"), nothing("mbconv"))]]
    run = stub.run(*calls, ["workspace", "mbconv", PROBLEMS["mbconv"] | {"batch": 0}]).assert_ok()
    assert run.results[-1]["value"] == 0
    assert run.records == []


def test_longer_structs_of_later_versions(stub):
    run = stub.run(launch("pointwise", beyond=[0] * 16)).assert_ok()
    assert len(run.launches) == 1


def test_shorter_structs_of_earlier_versions(stub):
    """What has been added since counts as zero."""
    run = stub.run(launch("pointwise", struct_size=c_api.Pointwise.weight_scale.offset)).assert_ok()
    assert len(run.launches) == 1


def test_what_has_no_kernel(stub):
    """Narrow maps and weights, where they are not aligned or do not lie in channels_last."""
    calls = [launch("pointwise", precision=c_api.NARROWING, x=X + 8), launch("pointwise", precision=c_api.WIDENING, layout=c_api.NCHW), launch("depthwise", precision=c_api.NARROW, stride_x=2),
             launch("pointwise", precision=c_api.NARROWING, epilogue=PROBLEMS["fold_batch_norm"]["epilogue"]), launch("narrow_weight", depth=12), launch("narrow_weight", out=OUT + 8),
             *(["launch", op, problem] for op, problem in MERGED.items())]  # fmt: skip
    run = stub.run(*calls)
    assert not run.launches
    missing = "effnet_aot: the library holds no variant of {} for this data type and layout"
    expected = "effnet::narrow_weight: weight and out must lie on 16-byte boundaries and depth be a multiple of 8, got others"
    assert [r["error"] for r in run.results] == [*map(missing.format, ("pointwise", "pointwise", "depthwise", "pointwise")), expected, expected,
                                                *(f"effnet::{op}: the library holds no kernel that was measured for such a product" for op in MERGED)]


def test_residual_may_be_the_output(stub):
    run = stub.run(launch("pointwise", residual=OUT)).assert_ok()
    assert run.launches[0]["parameters"]["residual"] == run.launches[0]["parameters"]["out"] == OUT


def test_last_error_belongs_to_its_thread(stub):
    run = stub.run(["last_error"], launch("pointwise", x=None), ["threads", 1, [["last_error"]]], launch("pointwise"), ["last_error"])
    before, failed, (in_thread,), succeeded, after = run.results
    assert before["value"] == in_thread[0]["value"] == ""
    assert failed["status"] == INVALID_ARGUMENT and succeeded["status"] == OK
    assert after["value"] == failed["error"] != ""


def test_kernel_info(stub):
    count = len(stub_cuda.manifest()["images"])
    run = stub.run(["kernel_info", count - 1], ["kernel_info", count], ["kernel_info", 0, 8], ["kernel_info", 0, 1000], ["kernel_info", 0, 0, True])
    assert len(run.kernels) == count
    assert [r["status"] for r in run.results] == [OK, INVALID_ARGUMENT, INVALID_ARGUMENT, OK, INVALID_ARGUMENT]
    assert run.results[1]["error"] == f"effnet_kernel_info: index must be below {count}, got {count}"
    assert run.results[2]["error"] == f"effnet_kernel_info: kernel->struct_size must be sizeof(effnet_kernel) = {ctypes.sizeof(c_api.Kernel)}, got 8"
    assert run.results[4]["error"] == "effnet_kernel_info: kernel must not be null, got null"


def test_device_image_needs_a_buffer(stub):
    image = stub.run(["device_image", 0]).assert_ok().results[0]["value"]
    assert image in ("cubin sm_89", "ptx compute_89", "cubin sm_86", "cubin sm_80")
    run = stub.run(["device_image", 0, len(image) + 1], ["device_image", 0, len(image)], ["device_image", 0, 0])
    assert [r["status"] for r in run.results] == [OK, INVALID_ARGUMENT, INVALID_ARGUMENT]
    assert run.results[0]["value"] == image
    assert run.results[1]["error"] == f"effnet_device_image: size must be at least {len(image) + 1}, got {len(image)}"


# ---- the library without torch ----


def test_library_without_torch_launches_the_same(stub):
    """Each library in a process that has no torch; the first needs libtorch_cpu to load, the second nothing."""
    calls = [launch(op) for op in PROBLEMS]
    ours, theirs = stub.run(*calls).assert_ok(), stub.run(*calls, library=C_LIBRARY, dependencies=()).assert_ok()
    assert len(theirs.kernels) == len(ours.kernels) == len(effnet_aot.kernels())
    assert [(r["kernel"], r["grid"], r["parameters"]) for r in theirs.launches] == [(r["kernel"], r["grid"], r["parameters"]) for r in ours.launches]
    refused = [launch("pointwise", x=None), ["device_image", 7]]
    assert stub.run(*refused, library=C_LIBRARY, dependencies=()).results == stub.run(*refused).results


def test_c_project_with_cmake(tmp_path, stub):
    """A project without C++ takes the C library from the CMake package, and finds nothing of torch."""
    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    assert cmake, "the test extra has cmake"
    shutil.copy(EXAMPLE / "pointwise.c", tmp_path)
    tmp_path.joinpath("CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(app C)\nfind_package(effnet_aot CONFIG REQUIRED)\n"
        "add_executable(app pointwise.c)\ntarget_link_libraries(app PRIVATE effnet_aot::effnet_aot_c dl m)\n"
    )
    configure = [cmake, "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={effnet_aot.cmake_prefix_path}", f"-DCMAKE_C_COMPILER={CC}"]
    for command in (configure, [cmake, "--build", tmp_path / "build"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run([tmp_path / "build/app"], env=stub.executing(stub.new_log()), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- the example ----


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    folder = tmp_path_factory.mktemp("example") / "c"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("pointwise"))
    effnet = f"EFFNET={Path(effnet_aot.__file__).parent}"  # also where nothing is installed
    subprocess.run(["make", "-s", "-C", folder, f"PYTHON={sys.executable}", f"CC={CC}", effnet, "CFLAGS=-O2 -Wall -Wextra -Werror"], check=True)
    return folder / "pointwise"


def test_example_needs_no_torch(stub, example):
    needed = subprocess.run(["ldd", example], env=stub.environment(stub.new_log()), capture_output=True, text=True, check=True).stdout
    assert "libeffnet_aot_c.so => " in needed and "not found" not in needed
    names = re.sub(r"\(0x[0-9a-f]+\)", "", needed.replace(str(C_LIBRARY.parent), ""))  # an address may spell c10
    assert not re.search("torch|c10|cuda|python|libeffnet_aot.so", names)


def test_example_against_the_stub(stub, example):
    log = stub.new_log()
    done = subprocess.run([example], env=stub.executing(log), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "device 0 is served by " in done.stdout
    (made,) = [r for r in stub.read(log) if r["call"] == "cuLaunchKernelEx"]
    parameters = made["parameters"]
    assert made["kernel"] == "effnet_pointwise" and made["stream"] == 0
    assert (parameters["pixels"], parameters["out_channels"], parameters["in_channels"], parameters["high"]) == (2 * 28 * 28, 144, 24, 6.0)


def test_example_reports_a_wrong_result_and_an_error(stub, example):
    done = subprocess.run([example], env=stub.environment(stub.new_log()), capture_output=True, text=True)  # nothing is computed
    assert done.returncode == 1 and "largest error nan" in done.stdout.replace("-nan", "nan")
    done = subprocess.run([example], env=stub.environment(stub.new_log(), fail="cuLaunchKernelEx=700"), capture_output=True, text=True)
    assert done.returncode == 1 and "CUDA_ERROR_ILLEGAL_ADDRESS" in done.stderr


@pytest.mark.gpu
def test_example_on_a_gpu(example):
    done = subprocess.run([example], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
