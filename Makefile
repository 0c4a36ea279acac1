# One environment, one way to run each step. `make demo` and `make test` set up whatever is missing.
PY := .venv/bin/python
READY := .venv/.ready
DEMO := outputs/demo
PARAMS ?=
RUNS ?=

.PHONY: setup browser demo demo-candidates test check notebooks rank prune recover evaluate report bench kaggle-push kaggle-follow kaggle-status kaggle-pull clean

setup: $(READY)

$(READY): requirements.txt pyproject.toml
	test -x $(PY) || python3 -m venv .venv
	$(PY) -m pip install -q -r requirements.txt
	$(PY) -m pip install -q --no-deps -e .
	touch $@

# $(call execute,NOTEBOOK,PARAMS FILE): the executed copy goes to outputs/executed/, named after its parameters.
executed = outputs/executed/$(patsubst params/%.yaml,%,$(1))
# papermill writes the names in the file into a cell, as they are: they are looked at first.
define execute
	$(PY) -m eaftlib check $(1) $(2)
	mkdir -p $(dir $(call executed,$(2)))
	$(PY) -m papermill notebooks/$(1).ipynb $(call executed,$(2)).ipynb -f $(2)
endef

# The report's page is tested in Debian's Chromium. Where it cannot be installed those tests are skipped, and say why.
browser: $(READY)
	@command -v chromium > /dev/null || { test "`id -u`" = 0 && command -v apt-get > /dev/null \
		&& apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y chromium > /dev/null; } \
		|| echo "no chromium, and it cannot be installed here: tests of the report's page are skipped"

again = $(MAKE)  # by another name: `make -n demo`, too, is to run nothing
# Rank; sweep twelve keep-sets in one pass; recover half the experts; judge the result on many blocks. Meanwhile, in the
# background, the whole model is scored on those blocks: each half of the processors.
demo: $(READY)
	rm -rf $(addprefix $(DEMO)/,rank evaluate recovered-16* final report report-final)
	mkdir -p $(DEMO)
	@echo "In the background: the whole model on many blocks, log in $(DEMO)/final-base.log"
	@export OMP_NUM_THREADS=`$(PY) -c "import os; print(max(1, os.cpu_count() // 2))"`; \
	$(again) evaluate PARAMS=params/demo/final-base.yaml > $(DEMO)/final-base.log 2>&1 & base=$$!; \
	trap "kill $$base 2> /dev/null" EXIT; \
	$(again) demo-candidates && { wait $$base || { cat $(DEMO)/final-base.log; exit 1; }; }
	$(call execute,03_evaluate,params/demo/final-recovered-16.yaml)
	$(call execute,04_report,params/demo/report-final.yaml)
	@$(PY) -m eaftlib summary $(DEMO)/report/verdict.json $(DEMO)/report-final/verdict.json
	@echo "Open $(DEMO)/report/report.html and $(DEMO)/report-final/report.html"

demo-candidates: $(READY)
	$(call execute,01_rank,params/demo/rank.yaml)
	$(call execute,03_evaluate,params/demo/evaluate.yaml)
	$(call execute,04_report,params/demo/report.yaml)
	$(call execute,05_recover,params/demo/recover-16-start.yaml)
	$(call execute,05_recover,params/demo/recover-16.yaml)

test: $(READY) browser
	$(PY) -m pytest -n 2 --dist loadfile

# With the lowest versions that pyproject.toml allows, in an environment of their own (7 GB with PyTorch's CUDA build).
MINIMUM := .venv-minimum
PYTHON ?= python3.12
CORE := attention checkpoint criteria evaluation experts forward golden half kaggle_image kernels launch mxfp4 packs recovery slicing
.PHONY: test-minimum
test-minimum:
	test -x $(MINIMUM)/bin/python || $(PYTHON) -m venv $(MINIMUM)
	$(PYTHON) tests/minimum.py > $(MINIMUM)/requirements.txt
	$(MINIMUM)/bin/python -m pip install -q -r $(MINIMUM)/requirements.txt
	$(MINIMUM)/bin/python -m pip install -q --no-deps -e .
	$(MINIMUM)/bin/python -m pytest $(CORE:%=tests/test_%.py)

# What a commit must pass besides the tests: style, rooms that import downwards, notebooks that are exactly their sources.
check: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	.venv/bin/lint-imports
	$(PY) -m eaftlib notebooks --check

notebooks: $(READY)
	$(PY) -m eaftlib notebooks

rank prune recover evaluate report: $(READY)
	@test -n "$(PARAMS)" || { echo "usage: make $@ PARAMS=params/MODEL/NAME.yaml"; exit 2; }
	$(if $(word 2,$(PARAMS)),$(error PARAMS: found "$(PARAMS)", expected one file, without a space in its path))
	$(call execute,$(notebook_$@),$(PARAMS))
notebook_rank := 01_rank
notebook_prune := 02_prune
notebook_recover := 05_recover
notebook_evaluate := 03_evaluate
notebook_report := 04_report

# Stays until the runs are verified, over as many sessions as they take (UNTIL=submitted: until all are submitted). PARAMS may
# be a quoted pattern. AT_LIMIT=stop ends where a limit of the account is reached; RESUME=1 pushes failed runs again.
kaggle-push: $(READY)
	@test -n "$(PARAMS)" || { echo "usage: make $@ PARAMS='params/MODEL/eval-*.yaml' [UNTIL=submitted] [AT_LIMIT=stop] [RESUME=1]"; exit 2; }
	$(PY) -m eaftlib kaggle push $(PARAMS) $(if $(UNTIL),--until $(UNTIL)) $(if $(AT_LIMIT),--at-limit $(AT_LIMIT)) $(if $(RESUME),--resume)

# The same for runs that were pushed before.
kaggle-follow: $(READY)
	$(PY) -m eaftlib kaggle follow $(RUNS) $(if $(AT_LIMIT),--at-limit $(AT_LIMIT))

kaggle-status kaggle-pull: $(READY)
	$(PY) -m eaftlib kaggle $(@:kaggle-%=%) $(RUNS)

bench: $(READY)
	$(PY) bench/run.py

clean:
	rm -rf outputs/demo outputs/executed build *.egg-info .pytest_cache .ruff_cache
