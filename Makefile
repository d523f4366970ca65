VENV := .venv
STAMP := $(VENV)/.installed
PYTHON ?= python3

.PHONY: install demo test test-page test-vllm test-oldest lint docs bench-cpu

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[dev,docs,eval,interpreter,server,train]'
	touch $@

demo: install
	$(VENV)/bin/sparsekv demo

test: install
	$(VENV)/bin/pytest -n 2

# The server's page in headless Chromium; installs Debian's packages where they are missing.
test-page: install
	command -v chromium chromedriver > /dev/null || (apt-get update && apt-get install -y --no-install-recommends chromium chromium-driver)
	$(VENV)/bin/pytest -m page tests/page

# The oldest versions that pyproject.toml allows. The interpreter of Triton 3.6 needs an older NumPy.
OLDEST := .venv-oldest

test-oldest:
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install 'torch==2.11.*' 'transformers==5.17.*' 'triton==3.6.*' 'numpy<2.4' -e '.[dev,eval,server,train]'
	$(OLDEST)/bin/pytest -n 2

# The plugin inside vLLM, on the CPU, in an environment of its own: vLLM pins its own versions. VLLM=0.32 is the newest.
VLLM := 0.26

test-vllm: .venv-vllm-$(VLLM)/.installed
	OMP_NUM_THREADS=1 .venv-vllm-$(VLLM)/bin/python -m pytest -c tests_vllm/pytest.ini tests_vllm

.venv-vllm-%/.installed: pyproject.toml tests_vllm/pins/%.txt tests_vllm/pins/%-vllm.txt
	$(PYTHON) -m venv .venv-vllm-$*
	.venv-vllm-$*/bin/python -m pip install -r tests_vllm/pins/$*.txt
	.venv-vllm-$*/bin/python -m pip install --no-deps --require-hashes -r tests_vllm/pins/$*-vllm.txt
	.venv-vllm-$*/bin/python -m pip install --no-deps -e .
	touch $@

lint: install
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports

docs: install
	$(VENV)/bin/mkdocs build --strict

# Some minutes on a machine with nothing else to do; replaces the results and the table made from them.
CPU_RESULTS := benchmarks/results/cpu.jsonl

bench-cpu: install
	rm -f $(CPU_RESULTS)
	for seed in 0 1 2 3 4; do \
		for what in "decode" "decode --adapter adapters/smollm2-135m" "prefill" "prefill --adapter adapters/smollm2-135m"; do \
			$(VENV)/bin/sparsekv bench $$what --threads 2 --seed $$seed --json >> $(CPU_RESULTS) || exit 1; \
		done; \
	done
	$(VENV)/bin/python -m sparsekv.bench.reports.performance $(CPU_RESULTS) docs/performance.md
