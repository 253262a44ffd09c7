# make demo    the whole line on real solar cells; writes runs/demo/report.html
# make test    install what the tests need and run every test
# make lint    ruff, mypy --strict, clang-format     make format    apply them     make docs    check docs/ and README
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test system-packages lint format docs clean

demo: $(VENV)/.demo
	$(BIN)/meliad-edge demo --out runs/demo

# Two files at a time: many tests wait for a camera, a device or a clock.
test: system-packages $(VENV)/.dev
	$(BIN)/pytest --numprocesses 2 --dist loadfile

system-packages:
	scripts/install_test_packages.sh

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files 'kernels/*.cpp' 'kernels/*.hpp' 'kernels/*.cu' 'kernels/*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'kernels/*.cpp' 'kernels/*.hpp' 'kernels/*.cu' 'kernels/*.cuh' | xargs $(BIN)/clang-format -i

docs: $(VENV)/.dev
	$(BIN)/pytest tests/docs

$(BIN)/python:
	scripts/create_venv.sh $(PYTHON) $(VENV)

# Installed again when the build or its sources change; Python files are used where they are.
BUILD_FILES := pyproject.toml CMakeLists.txt $(shell find kernels -type f)

$(VENV)/.demo: $(BIN)/python $(BUILD_FILES)
	scripts/fetch_onnxruntime_headers.sh
	scripts/fetch_tensorrt_headers.sh $(BIN)/python
	$(BIN)/python -m pip install -e '.[demo]'
	@$(BIN)/meliad-edge doctor | grep -A1 'scoring kernel'
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --progress-bar off -e '.[demo,dev]'
	@! command -v nvcc >/dev/null || $(BIN)/python -m pip install --quiet --progress-bar off -e '.[tensorrt-test]' || \
		echo "TensorRT's packages cannot be installed: tests that need them skip"
	touch $@

clean:
	rm -rf $(VENV) .cache build runs
