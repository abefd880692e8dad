"""The native half of the build; everything declarative is in pyproject.toml.

    triton_src/*.py  --effnet_aot/aot-->  cubins, PTX, registry.cpp, manifest.json
    csrc/*.cpp + the registry        -->  effnet_aot/lib/libeffnet_aot.so   (ops, kernels; stable ABI, no Python)
    those of them that need no torch -->  effnet_aot/lib/libeffnet_aot_c.so (kernels, C API; for programs without torch)
    csrc/bindings.cpp                -->  effnet_aot/_C.*.so                (pybind11, linked to the first)

Both libraries hold the images: either is complete by itself, and loading the first must need nothing but torch.

pip runs this file several times; only the build step gets as far as build_extensions(). Ninja is called directly, not
through torch.utils.cpp_extension: that imports torch (seconds in every one of pip's processes), links torch_python, and
inherits the interpreter's own compiler and linker flags, absolute rpaths among them.
"""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent


class BuildNative(build_ext):
    """Builds the libraries with ninja, and puts them, the manifest and what C++ programs need into the package."""

    # For effnet_aot/tune/bundle.py.
    user_options = [*build_ext.user_options, ("candidates=", None, "build in what tuning tries: OP,...:PRECISION,...:NAME,..., where nothing means all")]

    def initialize_options(self):
        super().initialize_options()
        self.candidates = None

    def build_extensions(self):
        print(f"building against {folder_of('torch')} and {folder_of('triton')}", flush=True)
        kernels = self.compile_kernels()
        built = self.compile_sources(kernels)
        built["manifest.json"] = kernels.manifest
        built |= {f"include/{p.relative_to('csrc/include')}": p for p in Path("csrc/include").rglob("*.h")}
        built |= {f"share/cmake/effnet_aot/{p.name}": p for p in self.cmake_package()}
        for name, path in built.items():
            self.install(path, Path(self.build_lib, "effnet_aot", name))
        self.installed = list(built)

    def cmake_package(self):
        version = Path(self.build_temp, "effnet_aotConfigVersion.cmake")
        version.write_text(Path("csrc/cmake", version.name).read_text().replace("@VERSION@", self.distribution.get_version()))
        return Path("csrc/cmake/effnet_aotConfig.cmake"), version

    def compile_kernels(self):
        # The driver is imported from its folder: importing effnet_aot would need the library that is being built.
        sys.path.insert(0, str(ROOT / "effnet_aot"))
        from aot import BuildError, build_kernels

        cache = os.environ.get("EFFNET_AOT_CACHE") or ROOT / "build/kernels"
        try:
            tried = None if self.candidates is None else [part.split(",") if part else None for part in self.candidates.split(":")]
            return build_kernels(Path(self.build_temp, "kernels"), cache, candidates=tried)
        except BuildError as error:
            raise CompileError(str(error)) from error

    def compile_sources(self, kernels):
        """Writes and runs build.ninja; returns {name in the package: built file}. Paths are relative to this folder."""
        import pybind11
        from ninja import BIN_DIR
        from ninja.ninja_syntax import Writer

        temp = Path(self.build_temp)

        def linked(name, folder):
            """Build isolation unpacks packages into new folders, torch too where the environment had none at first; behind a link
            the command lines stay the same."""
            link = temp / name
            link.unlink(missing_ok=True)
            link.symlink_to(folder)
            return link

        torch_version = version("torch").partition("+")[0]  # without "+cpu" or "+cu130": a library is the same whichever of them it was built beside
        torch = linked(f"torch-{torch_version}", folder_of("torch"))
        pybind11_headers = linked(f"pybind11-{pybind11.__version__}", pybind11.get_include())
        cuda_headers = linked(f"cuda-of-triton-{version('triton')}", kernels.cuda_headers)
        library, c_library = temp / "libeffnet_aot.so", temp / "libeffnet_aot_c.so"
        module = temp / Path(self.get_ext_filename("effnet_aot._C")).name
        python_headers = sysconfig.get_path("include")
        if not Path(python_headers, "Python.h").exists():
            raise CompileError(f"no Python.h in {python_headers}; install the development package of this Python (python3-dev)")

        def headers(folder):
            # Mapped, so that the __FILE__ of an error message names no folder of the machine that built the package.
            return f"-isystem {shlex.quote(str(folder))} -ffile-prefix-map={shlex.quote(str(folder))}=include"

        common = "-std=c++20 -O2 -fPIC -Wall -fvisibility=hidden -fvisibility-inlines-hidden -Icsrc -Icsrc/include"
        for_library = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", headers(torch / "include"), headers(cuda_headers)]
        # -MMD does not watch other packages' headers; torch's version, in the command line, stands for them.
        for_library += [f"-DEFFNET_AOT_TORCH_VERSION={shlex.quote(json.dumps(torch_version))}"]
        # Not torch's headers: some versions carry a pybind11 of their own.
        for_module = [headers(pybind11_headers), headers(python_headers)]

        with open(temp / "build.ninja", "w") as file:
            ninja = Writer(file, width=140)
            ninja.variable("builddir", str(temp))  # ninja's log
            ninja.variable("cxx", os.environ.get("CXX", "g++"))
            ninja.rule("compile", f"$cxx {common} $flags -MMD -MF $out.d -c $in -o $out", "c++ $in", depfile="$out.d", deps="gcc")
            ninja.rule("link", "$cxx -shared -o $out $in $flags", "link $out")

            def compile(source, flags, needs=None):
                target = temp / f"{Path(source).stem}.o"
                return ninja.build(str(target), "compile", str(source), needs, variables={"flags": " ".join(flags)})[0]

            def link(target, objects, flags, needs=None):
                ninja.build(str(target), "link", objects, needs, variables={"flags": " ".join(flags)})

            sources = sorted(set(Path("csrc").glob("*.cpp")) - {Path("csrc/bindings.cpp")})
            objects = {source: compile(source, for_library) for source in sources}
            # The registry includes the images with .incbin, which the assembler looks up and no depfile mentions.
            registry = compile(kernels.registry_cpp, [*for_library, f"-Wa,-I{shlex.quote(str(kernels.blob.parent))}"], str(kernels.blob))
            without_torch = [target for source, target in objects.items() if not includes_torch(source)]
            # -z defs: a symbol that libtorch_cpu and the C++ runtime do not have fails here, not on the user's machine.
            for name, parts, torch_cpu in (
                (library, objects.values(), [f"-L{shlex.quote(str(torch / 'lib'))} -ltorch_cpu"]),
                (c_library, without_torch, []),
            ):
                link(name, [*parts, registry], [f"-Wl,-soname,{name.name} -Wl,-z,defs -Wl,--as-needed -Wl,-s -Wl,--version-script=csrc/linker.map", *torch_cpu, "-ldl -pthread"], "csrc/linker.map")
            link(module, [compile("csrc/bindings.cpp", for_module)], [f"-L{temp} -l:{library.name} -Wl,-rpath,'$$ORIGIN/lib'"], str(library))

        jobs = os.environ.get("MAX_JOBS")
        if subprocess.run([Path(BIN_DIR, "ninja"), "-f", temp / "build.ninja", *(["-j", jobs] if jobs else [])]).returncode:
            raise CompileError("the C++ sources did not compile; g++'s message is above")
        return {f"lib/{library.name}": library, f"lib/{c_library.name}": c_library, module.name: module}

    def copy_extensions_to_source(self):  # pip install -e, build_ext --inplace
        for regular, inplace in self._get_output_mapping():
            self.install(regular, inplace)

    def _get_output_mapping(self):
        for name in self.installed if self.inplace else ():
            yield str(Path(self.build_lib, "effnet_aot", name)), str(Path("effnet_aot", name))

    def get_outputs(self):
        return [str(Path(self.build_lib, "effnet_aot", name)) for name in self.installed]

    def install(self, source, target):
        # Unlinked first: a running process may have mapped the old library.
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).unlink(missing_ok=True)
        self.copy_file(str(source), str(target))


def includes_torch(source):
    """Whether a file of csrc/ includes torch's headers, itself or through others of csrc/."""
    text = source.read_text()
    return "#include <torch/" in text or any(includes_torch(source.with_name(name)) for name in re.findall(r'#include "(\w+\.h)"', text))


def folder_of(package):
    """Where a package lies, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise CompileError(f"building effnet_aot needs {package}, which this Python does not have")
    return Path(spec.submodule_search_locations[0])


if __name__ == "__main__":  # the kernel compilers are spawned processes, which import this file again
    setup(ext_modules=[Extension("effnet_aot._C", ["csrc/bindings.cpp"])], cmdclass={"build_ext": BuildNative})
