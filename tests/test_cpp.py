"""The C++ interface: examples/cpp is built with CMake against the package and the torch under test, and run without Python."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from inductor import skip_if_every_package_crashes

import effnet_aot

PACKAGE = Path(effnet_aot.__file__).parent
EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "cpp"

pytestmark = [
    pytest.mark.skipif(not EXAMPLES.exists(), reason="needs a checkout"),
    pytest.mark.xdist_group("cpp"),  # one worker, so that the programs are built once
]


def run(*command, crashed=lambda: None, **kwargs):
    """What a command prints, after checking that it succeeds; crashed() is called first where a signal ended it."""
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=900, **kwargs)
    if result.returncode < 0:
        crashed()
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


def cmake(*arguments):
    tool = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    assert tool, "the test extra has cmake"
    return run(tool, *arguments)


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The folder of the built programs. --as-needed, a default of many distributions, drops libraries that nobody names."""
    folder = tmp_path_factory.mktemp("cpp")
    prefix = ";".join([effnet_aot.cmake_prefix_path, *torch.__path__])
    cmake("-S", EXAMPLES, "-B", folder, "-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_PREFIX_PATH={prefix}",
          "-DCMAKE_CXX_FLAGS=-Wall -Werror", "-DCMAKE_EXE_LINKER_FLAGS=-Wl,--as-needed")  # fmt: skip
    cmake("--build", folder, "--parallel", "2")
    return folder


def schemas():
    """The public ops."""
    return sorted(name.removeprefix("effnet::") for name in torch._C._dispatch_get_all_op_names() if re.fullmatch(r"effnet::[a-z]\w+", name))


def test_header_has_every_op():
    text = (PACKAGE / "include/effnet_aot/effnet_aot.h").read_text()
    assert sorted(re.findall(r"^inline (?:at::Tensor|std::tuple<at::Tensor, at::Tensor>) (\w+)\(", text, re.M)) == schemas()


def test_programs_need_the_library_and_no_python(programs):
    for name in ("ops", "aoti", "benchmark"):
        direct = run("readelf", "-dW", programs / name)
        assert "[libeffnet_aot.so]" in direct, "kept, though no symbol of it need be named"
        assert not re.search(r"NEEDED.*(python|libcuda|libcudart|libnvrtc)", direct)
        assert "python" not in re.sub(r"=>.*", "", run("ldd", programs / name)), "neither does anything that they load"


def test_ops(programs, device):
    text = run(programs / "ops", device)
    assert sorted(re.findall(r"^(\w+) +error \S+$", text, re.M)) == schemas()
    assert f"{len(effnet_aot.kernels())} images in the library" in text
    with pytest.raises(RuntimeError) as error:
        torch.ops.effnet.pointwise(torch.ones(2, 24, 15, 14), torch.ones(96, 24, 1, 1), activation="gelu")
    assert f"a bad argument throws: {str(error.value).splitlines()[0]}" in text
    if device == "cuda":
        assert re.search(r"served by (cubin sm_|ptx compute_)\d+", text)


def test_exported_network(programs, device, tmp_path):
    def crashed():
        skip_if_every_package_crashes(device, tmp_path)

    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    run(sys.executable, EXAMPLES / "export.py", tmp_path, device, cwd=tmp_path, env=environment, crashed=crashed)
    text = run(programs / "aoti", tmp_path, crashed=crashed)
    assert re.search(rf"output of 4 x 10 on {device}", text)


def test_benchmark(programs, device):
    assert re.search(r"effnet +[\d.]+ us\naten +[\d.]+ us", run(programs / "benchmark", device))


def test_version_of_the_cmake_package(tmp_path):
    """find_package(effnet_aot 0.1) takes 0.1.x and nothing else."""
    major, minor, patch = map(int, effnet_aot.__version__.split("."))
    wanted = {f"{major}.{minor}": True, f"{major}.{minor}.{patch}": True, f"{major}.{minor}.{patch + 1}": False,
              f"{major}.{minor + 1}": False, f"{major + 1}.{minor}": False, f"{major}.{minor}9": False}  # fmt: skip
    script, said = tmp_path / "version.cmake", tmp_path / "said"
    lines = [f'set(PACKAGE_FIND_VERSION {v})\ninclude("{PACKAGE}/share/cmake/effnet_aot/effnet_aotConfigVersion.cmake")\n'
             f'file(APPEND "{said}" "{v} ${{PACKAGE_VERSION_COMPATIBLE}}\n")\n' for v in wanted]  # fmt: skip
    script.write_text("".join(lines))
    cmake("-P", script)
    assert said.read_text().splitlines() == [f"{v} {str(good).upper()}" for v, good in wanted.items()]
