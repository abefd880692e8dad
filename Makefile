# A fresh machine needs Python >= 3.10 with its headers, g++ and make.
#
#   make run                        ten photographs through the network, on the GPU if there is one
#   make test                       the whole test suite (GPU tests are skipped where there is no GPU)
#   make gpu-test PYTHON=python3    GPU tests with the Python, torch and triton that are installed; no network, no .venv
#   make clean                      removes what was built; the environment stays

PYTHON ?= python3
VENV   ?= .venv
# Any pip requirement at or above 2.10, and the triton that pairs with it (needed to build only).
TORCH  ?= torch==2.13.0
TRITON ?= triton==3.7.1
PYTEST_ARGS ?=

NATIVE = setup.py build_backend.py pyproject.toml $(wildcard csrc/*.cpp csrc/*.h csrc/include/effnet_aot/*.h triton_src/*.py effnet_aot/aot/*.py)

.PHONY: run test gpu-test clean

run: $(VENV)/.package
	$(VENV)/bin/python -m effnet_aot run

# One thread a worker: the workers share the cores already.
test: $(VENV)/.package
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --dist loadgroup $(PYTEST_ARGS)

# Both images of every kernel: the cubins of this GPU, and the PTX that serves GPUs without a cubin.
gpu-test:
	@$(PYTHON) -c "import sys, torch; torch.cuda.is_available() or sys.exit('make gpu-test: torch finds no GPU on this machine')"
	$(PYTHON) setup.py build_ext --inplace
	status=0; for image in cubin ptx; do \
	  EFFNET_AOT_IMAGE=$$image $(PYTHON) -m pytest -m gpu --require-gpu $(PYTEST_ARGS) || status=1; \
	done; exit $$status

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install '$(TORCH)' '$(TRITON)'
	touch $@

# Editable, so that only native sources need a second installation.
$(VENV)/.package: $(VENV)/.torch $(NATIVE)
	$(VENV)/bin/pip install -e '.[photos,test]'
	touch $@

clean:
	rm -rf build dist *.egg-info effnet_aot/lib effnet_aot/include effnet_aot/_C.*.so effnet_aot/manifest.json $(VENV)/.package
