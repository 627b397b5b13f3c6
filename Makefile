# make demo   trains on handwritten digits and prints where the picture is (about 5 minutes)
# make test   runs the tests: those of launch/ by themselves, for their Ray and Slurm tell the dead by the time they take to
#             answer; then all others, two files at a time (JOBS=4 for more)
# Both set up all they need in .venv first: a virtual environment with the versions of constraints.txt.

PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/ready
	$(BIN)/sivae train configs/digits.yaml

test: .venv/ready
	failed=0; \
	$(BIN)/python -m pytest -m "not slow" tests/launch || failed=1; \
	$(BIN)/python -m pytest -m "not slow" --ignore tests/launch -n $(JOBS) --dist loadfile --no-loadscope-reorder || failed=1; \
	exit $$failed

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# torch first and alone: without it in place pip would fetch the newest build with gigabytes of CUDA libraries.
# setuptools and wheel are for deepspeed, which builds from source; DS_BUILD_OPS=0 compiles nothing. It asks for nvcc all the same
# where torch sees a GPU, or to fill an empty TORCH_CUDA_ARCH_LIST, and fails without: so it is told of a CPU, and of any GPU.
.venv/ready: setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"sivae needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet -c constraints.txt setuptools wheel ninja packaging
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu TORCH_CUDA_ARCH_LIST=9.0 $(BIN)/pip install --quiet --no-build-isolation -c constraints.txt deepspeed
	PYTHONWARNINGS=ignore $(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@

clean:
	rm -rf .venv
