# Two commands do everything on a machine with Python, pip, make and git: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two OpenMP threads that spin at a barrier stall each other on a busy machine.
export OMP_WAIT_POLICY = passive

.PHONY: demo page docs test test-all test-sweep lint types tests test-gpu durations browser bench bench-check zoo zoo-lrm zoo-weights zoo-onnx zoo-half zoo-libraries zoo-ops fuzz fuzz-files operators notebooks pictures clean

demo: $(VENV)/.installed  ## set up, train the instructed network on real digits, say where the results are
	$(BIN)/python examples/train_multi_mnist.py

page:  ## serve the page in the browser: networks are steered, instructed and taught there
	$(PYTHON) examples/web/serve.py

docs: $(VENV)/.docs  ## the documentation, with its tutorials executed: docs/_build/html/index.html (two minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -q -W --keep-going -E docs/site docs/_build/html
	@echo "open docs/_build/html/index.html"

test: lint types tests  ## set up, check style and types, and hold every promise once (nine minutes)

test-all: lint types  ## the same with larger cases, as continuous integration does after `make browser` (under an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -rfEs -m "not sweep"

test-sweep: $(VENV)/.installed  ## what test-all leaves out: more large models (half an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -rfEs -m sweep

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.installed
	$(BIN)/mypy

tests: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not long"

test-gpu: $(VENV)/.installed  ## laws, parity, passes, wrappers, learner and sessions on a GPU (four minutes); DEVICE=cpu: the small cases without one
	DEVICE=$(or $(DEVICE),cuda) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/gpu tests/test_devices.py -n $(if $(filter cpu,$(DEVICE)),2 -m "not long",8) --dist worksteal --show-capture=no

durations: $(VENV)/.installed  ## what every test takes, as a table: tests/durations.md (half an hour)
	rm -f .cpu_times
	OMP_NUM_THREADS=1 CPU_TIMES=.cpu_times PYTHONPATH=tests $(BIN)/python -m pytest -n 2 --dist worksteal -p cpu_times
	$(BIN)/python tests/cpu_times.py .cpu_times > tests/durations.md

browser: $(VENV)/.browser  ## a Chromium and Playwright, with which the tests open the page; without them those tests skip

bench: $(VENV)/.installed  ## speed against plain networks, hooks, autograd and ONNX Runtime: docs/benchmarks.md; DEVICE=cuda: on a GPU
	$(BIN)/python benchmarks/report.py

bench-check: $(VENV)/.installed  ## the same against the recorded figures: what got worse by more than 10 %
	$(BIN)/python benchmarks/report.py --check

zoo: $(VENV)/.installed  ## updates against autograd in every model of torchvision and in some of timm's, as a table: docs/zoo (hours)
	$(BIN)/python zoo/learning.py

zoo-lrm: $(VENV)/.installed  ## a feedback connection in every model of torchvision, as a table: docs/zoo (half an hour)
	$(BIN)/python zoo/feedback.py

zoo-weights: $(VENV)/.installed  ## every kind of feedback weights in every classifier of torchvision, as a table: docs/zoo (hours)
	$(BIN)/python zoo/feedback_weights.py

zoo-onnx: $(VENV)/.installed  ## ONNX files of every model of torchvision and of some of timm's, in ONNX Runtime, as a table: docs/zoo (hours)
	$(BIN)/python zoo/export.py

zoo-half: $(VENV)/.installed  ## files in half precision of torchvision's classifiers against float32, as a table: docs/zoo (two hours)
	OMP_NUM_THREADS=2 $(BIN)/python zoo/half.py

zoo-libraries: $(VENV)/.installed  ## models of other libraries as they come, updates and files of passes, as a table: docs/zoo (hours)
	$(BIN)/pip install -q -e .[zoo]
	$(BIN)/python zoo/libraries.py

zoo-ops: $(VENV)/.installed  ## every differentiable operator of PyTorch's own tests against autograd, and its ONNX file: docs/zoo (half an hour)
	OMP_NUM_THREADS=1 $(BIN)/python zoo/operators.py

fuzz: $(VENV)/.installed  ## random graphs against autograd: make fuzz N=10000
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py $(or $(N),1000)

fuzz-files: $(VENV)/.installed  ## damaged and hostile files, each an error that does nothing: make fuzz-files N=10000
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz_files.py $(or $(N),1000)

operators: $(VENV)/.installed  ## the page of all operators, docs/operators.md
	$(BIN)/python docs/generate_operators.py

notebooks: $(VENV)/.installed  ## the tutorials as notebooks: docs/_build/notebooks
	$(BIN)/python docs/make_notebooks.py docs/_build/notebooks

pictures: $(VENV)/.installed  ## the pictures of README, docs/pictures (a minute)
	$(BIN)/python docs/draw_pictures.py

$(VENV)/.installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

CHROMIUM = command -v chromium chromium-browser google-chrome google-chrome-stable microsoft-edge
APT = timeout 300 apt-get -qq update && timeout 900 apt-get -qq install -y --no-install-recommends chromium
$(VENV)/.browser: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[browser]'
	$(CHROMIUM) || { $(APT); } || sudo -n sh -c '$(APT)' || $(BIN)/python -m playwright install --with-deps chromium \
		|| echo "no Chromium can be installed here"
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) docs/_build build dist *.egg-info runs .cpu_times
