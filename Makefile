PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install -qq
# pinned for development; the plain wheel brings gigabytes of CUDA, which only a machine with a GPU wants
TORCH := torch==2.13.0
CPU_INDEX := --extra-index-url https://download.pytorch.org/whl/cpu

.PHONY: demo style small-batches analytic ddp test test-gpu bench results lint
.PHONY: test-gpu-build test-gpu-sanitizers

demo: $(VENV)/ready
	$(RUN) examples/digits.py $(ARGS)

style: $(VENV)/ready
	$(RUN) examples/style.py $(ARGS)

small-batches: $(VENV)/ready
	$(RUN) examples/small_batches.py $(ARGS)

# four experiments, a quarter of an hour; glibc keeps the pages of large results, so that times are not those of page faults
analytic: export MALLOC_MMAP_THRESHOLD_ = 4294967296
analytic: export MALLOC_TRIM_THRESHOLD_ = 8589934592
analytic: $(VENV)/ready
	for name in closure deep_sigmoid batch_sizes cost; do $(RUN) examples/analytic/$$name.py $(ARGS) || exit 1; done

ddp: $(VENV)/ready
	$(RUN) -m torch.distributed.run --standalone --nproc-per-node 3 examples/train_ddp.py $(ARGS)

test: $(VENV)/ready
	$(RUN) -m pytest $(ARGS)

bench: $(VENV)/ready
	$(RUN) -m bench $(ARGS)

# everything that stands in the README, measured anew; ARGS="layer_norm rms_norm": these norms, the nnU-Net block, the summary
results: $(VENV)/ready
	$(RUN) -m bench $(ARGS) && $(RUN) -m bench.nnunet && $(RUN) -m bench.accuracy $(filter-out add_% analytic_norm_weight activation_moments,$(ARGS)) && $(RUN) -m bench.report

lint: $(VENV)/ready
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check . && $(RUN) -m mypy normops

# the environment of all above: made once, and again when what it is made from changes
$(VENV)/ready: setup.py pyproject.toml $(shell find csrc -type f)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip setuptools wheel ninja numpy
	command -v nvidia-smi >/dev/null || $(PIP) $(TORCH)+cpu 2>/dev/null || $(PIP) $(TORCH)+cpu $(CPU_INDEX) || true
	$(PIP) $(TORCH)
	$(PIP) --no-build-isolation -e ".[triton,test,demo,examples,analytic,dev]"
	$(RUN) -m normops && touch $@

# on a GPU, with the torch and triton that python3 has; nothing is installed or downloaded. All parts, or PART=properties, the one that tells most,
# and so on: minutes each. Every processor runs its share of the tests; what fails is told at once, and again with its traceback in build/test-gpu
PART ?= properties kernels torch large sanitizers
JOBS ?= $(shell nproc)
properties := gpu
kernels := norms numerics row_norms batch_norm instance_norm statistics
torch := gradients transforms compile opcheck module models analytic_ops analytic_training propagated_models
large := large
SHARES = mkdir -p build/test-gpu && seq $(JOBS) | NORMOPS_TEST_DEVICE=cuda xargs -P $(JOBS) -I @ sh -c 'NORMOPS_TEST_SHARE=@/$(JOBS) \
	$(1) $(PYTHON) -m pytest -p no:cacheprovider $(2) $(ARGS) >build/test-gpu/@; code=$$?; tail -n 1 build/test-gpu/@; exit $$code'

test-gpu: $(PART:%=test-gpu-%)

test-gpu-build:
	NORMOPS_BUILD=1 $(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m normops

test-gpu-%: test-gpu-build
	$(call SHARES,,$(patsubst %,tests/test_%.py,$($*)))

test-gpu-large: override JOBS = 1

test-gpu-sanitizers: test-gpu-build
	export PYTORCH_NO_CUDA_MEMORY_CACHING=1; for tool in memcheck racecheck initcheck synccheck; do export tool; echo $$tool; \
		$(call SHARES,compute-sanitizer --tool $$tool --error-exitcode 1,tests/test_gpu.py -k "test_every_op and not reference") || exit 1; done
