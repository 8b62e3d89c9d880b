# make demo, test-fast, test, test-vllm, test-gpu, check, docs, bench, pictures. Each sets up what it needs, in .venv.
# PYTHON=python3 uses an environment that is there already (a GPU host without a network).
VENV := .venv
PYTHON ?= $(VENV)/bin/python
export PYTHONUNBUFFERED = 1

ifeq ($(PYTHON),$(VENV)/bin/python)
ENVIRONMENT := $(VENV)/.ready
# An FA4 that refuses a varlen mask_mod, in an environment of its own: tests/fa4/test_old_build.py compiles with it.
OLD_VENV := .venv-old-fa4
OLD_BUILD := $(OLD_VENV)/.ready
export OLD_FA4_PYTHON := $(CURDIR)/$(OLD_VENV)/bin/python
endif

# vLLM 0.33.0 on a CPU, whose transformers is older: the real engine on this library's backend.
VLLM_VENV := .venv-vllm
VLLM_TESTS := tests/integrations/vllm_engine

.PHONY: demo test-fast test test-old-transformers test-vllm test-gpu check docs bench pictures

demo: $(ENVIRONMENT)
	$(PYTHON) examples/photo.py --out demo.png

test-fast: $(ENVIRONMENT)
	$(PYTHON) -m pytest -m "not slow and not gpu" -n 2

test: $(ENVIRONMENT) $(OLD_BUILD)
	$(PYTHON) -m pytest -n 2 --dist loadfile

# The integration with the oldest transformers that it supports; `make test` has the newest, and what its version does
# not change: Triton's interpreter, and that the benchmark runs.
test-old-transformers: $(ENVIRONMENT) .old-transformers/.ready
	PYTHONPATH=.old-transformers $(PYTHON) -m pytest -n 2 tests/integrations -k "transformers and not interpreter and not benchmark"

.old-transformers/.ready:
	$(PYTHON) -m pip install --progress-bar off --no-deps --target .old-transformers transformers==5.23.0
	touch $@

test-vllm: $(VLLM_VENV)/.ready
	$(VLLM_VENV)/bin/python -m pytest $(VLLM_TESTS)

test-gpu: $(ENVIRONMENT)
	$(PYTHON) -m pytest -m gpu -n 8

check: $(ENVIRONMENT)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -c "from importlinter.cli import lint_imports_command as lint; lint()"
	$(MAKE) --no-print-directory docs

docs: $(ENVIRONMENT)
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

bench: $(ENVIRONMENT)
	$(PYTHON) benchmarks/forward.py
	$(PYTHON) benchmarks/serving.py
	$(PYTHON) benchmarks/backward.py

pictures: $(ENVIRONMENT)
	$(PYTHON) docs/pictures.py

# torch first and by its version: where a CPU build is at hand this takes it instead of fetching gigabytes of CUDA.
$(VENV)/.ready: pyproject.toml
	@echo "Setting up $(VENV), once: torch, then FlashAttention-4 and the tools. Some minutes; see pip's lines below."
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --progress-bar off torch==2.13.0
	$(VENV)/bin/python -m pip install --progress-bar off -e ".[dev]"
	touch $@

$(OLD_VENV)/.ready: pyproject.toml
	@echo "Setting up $(OLD_VENV), once: torch and flash-attn-4 4.0.0b12. Some minutes; see pip's lines below."
	python3 -m venv $(OLD_VENV)
	$(OLD_VENV)/bin/python -m pip install --progress-bar off torch==2.13.0
	$(OLD_VENV)/bin/python -m pip install --progress-bar off -e ".[old-fa4]"
	touch $@

# The sdist without extensions (47 MB). torchvision's wheel is made for CUDA; torchvision_on_cpu.py has it imported all the same.
$(VLLM_VENV)/.ready: pyproject.toml $(VLLM_TESTS)/requirements.txt
	@echo "Setting up $(VLLM_VENV), once: torch and vLLM 0.33.0. Some minutes; see pip's lines below."
	python3 -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --progress-bar off torch==2.13.0
	$(VLLM_VENV)/bin/python -m pip install --progress-bar off -r $(VLLM_TESTS)/requirements.txt
	$(VLLM_VENV)/bin/python -m pip install --progress-bar off --no-deps torchvision==0.28.0
	cp $(VLLM_TESTS)/torchvision_on_cpu.py $(VLLM_VENV)/lib/python3*/site-packages/
	echo "import torchvision_on_cpu" > $$(echo $(VLLM_VENV)/lib/python3*/site-packages)/torchvision_on_cpu.pth
	VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=0.33.0 $(VLLM_VENV)/bin/python -m pip install --progress-bar off \
		--no-deps --no-build-isolation --no-binary vllm vllm==0.33.0
	$(VLLM_VENV)/bin/python -m pip install --progress-bar off --no-deps --no-build-isolation -e .
	touch $@
