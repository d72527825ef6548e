# Everything a person types. `make` alone lists the targets.

export PATH := $(CURDIR)/.venv/bin:$(PATH)
export HF_HUB_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.PHONY: help setup llama-server vllm llmcompressor lock sbom unit deps repro classify experiments chat serve studio studio-files report remote-check ci-lock ci-summary lint format test \
	test-all \
	bench bench-merge bench-faithful bench-quantize bench-data bench-train bench-cuda bench-generate bench-engine bench-serve bench-attention \
	bench-experiments bench-studio bench-intervals bench-memory bench-loss bench-convert bench-by-hand bench-growth bench-pruning \
	bench-tracking bench-classify chaos docs docs-serve docs-check clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

# Starts with any Python, which finds the one to go on with. What is set up already is recognized in milliseconds.
setup: ## make .venv and what belongs to it; PYTHON=python3.12, EXTRAS="mlflow wandb" (default: dev), CUDA=1
	@starter=$$(command -v python3 || command -v "$(PYTHON)") || \
		{ echo "error: no python3 on the PATH; install Python 3.11, 3.12 or 3.13" >&2; exit 2; }; \
	"$$starter" tools/install.py --extras "$(EXTRAS)" $(if $(PYTHON),--python "$(PYTHON)") $(if $(CUDA),--cuda "$(CUDA)")

# What these need beside the default pipeline.
bench bench-merge bench-faithful bench-quantize bench-data bench-train bench-cuda bench-generate bench-engine bench-serve bench-attention bench-experiments bench-studio \
	bench-tracking bench-classify bench-intervals bench-memory bench-loss bench-convert bench-by-hand bench-growth bench-pruning chaos \
	docs docs-serve docs-check format lint lock sbom unit test test-all: EXTRAS += dev
bench-cuda: EXTRAS += gpu
bench-serve: EXTRAS += serve
classify: EXTRAS += classify
serve studio: EXTRAS += serve search

llama-server: setup ## build llama.cpp's own server, by which make serve answers many requests at once
	@python -m lathe.gguf.build_llama_server

vllm: ## make .vllm, an environment of its own with vLLM, for generate.engine: vllm; needs Linux and a GPU, gigabytes
	python3 -m venv .vllm
	.vllm/bin/python -m pip install --requirement requirements-vllm.txt

llmcompressor: ## make .llmcompressor, an environment of its own with llmcompressor, for the formats fp8 and awq of export.formats
	python3 -m venv .llmcompressor
	.llmcompressor/bin/python -m pip install --requirement requirements-llmcompressor.txt

lock: setup ## rewrite requirements.lock after an edit of pyproject.toml
	python tools/write_lock.py

sbom: setup ## write sbom.cdx.json: a CycloneDX bill of every package that make setup may install
	python tools/sbom.py

repro: setup ## run the whole pipeline: base model and data in, measured GGUF files out
	@python -m lathe repro

classify: setup ## run the classifier's pipeline: texts and labels in, a measured classifier and its ONNX file out
	@python -m lathe repro classify/dvc.yaml

experiments: setup ## list the recipes, with the scores of those that have been run
	@python -m lathe experiments

chat: setup ## talk to the best GGUF; PROMPT="…" answers once
	@python -m lathe chat $(if $(PROMPT),--prompt "$$PROMPT")

serve: setup ## serve the best GGUF on 127.0.0.1 as OpenAI's API does; PORT=… for another port
	@python -m lathe serve $(if $(PORT),--port "$$PORT")

studio: setup ## start, watch and compare experiments in a browser; PORT=… for another port
	@python -m lathe studio $(if $(PORT),--port "$$PORT")

studio-files: ## copy the scripts of the studio's pages out of the npm packages in tools/studio/package.json
	python3 tools/studio_files.py

report: setup ## write metrics/report/index.html: one page with all that was measured
	@python -m lathe report

remote-check: setup ## write to the DVC remote, read it back and delete it; REMOTE=ycloud for another than the default
	@python -m lathe remote-check $(if $(REMOTE),--remote "$$REMOTE")

ci-lock: setup ## say whether dvc.lock is of the committed code, parameters and data; runs no stage
	@.github/lock.sh

ci-summary: setup ## Markdown of the scores against BASE=REVISION, and of the gates
	@.github/summary.sh "$${BASE:-HEAD}"

lint: setup ## ruff and mypy, and hadolint where it is installed
	ruff check .
	ruff format --check .
	mypy
	mypy classify/stages
	@if command -v hadolint >/dev/null; then hadolint Dockerfile Dockerfile.cuda; fi

format: setup ## rewrite the code as ruff wants it
	ruff check --fix .
	ruff format .

unit: setup ## the quick tests: pure functions and refusals, in under 90 seconds on 2 cores
	pytest tests/unit -m "not slow and not heavy" -n 2 --dist worksteal

deps: setup ## write the library modules of each stage into dvc.yaml, from what its script imports
	@python -m lathe.common.stage_dependencies

test: setup ## lint, documentation and all tests but the long ones
	@$(MAKE) --no-print-directory -j 2 lint docs-check
	pytest -m "not slow" -n 3 --dist loadfile --no-loadscope-reorder

test-all: lint docs-check ## every test
	LATHE_ALL_TESTS=1 pytest

chaos: setup ## more than a hundred faults: kills, full disks, damaged files, two at once; half an hour. TAKE=15 for a part
	PYTHONPATH=src:tests python -m chaos $(if $(TAKE),--take "$(TAKE)",--write docs/faults.md)

bench: bench-merge bench-data bench-train bench-faithful bench-quantize bench-generate bench-engine bench-serve bench-attention bench-experiments bench-studio bench-tracking bench-classify bench-intervals bench-memory bench-loss bench-convert bench-by-hand bench-growth bench-pruning ## every benchmark, whose tables are written into docs/benchmarks.md

bench-merge: setup ## time and memory of the merge against PEFT's, at 0.6 B parameters
	python benchmarks/page.py "merge.py --rounds 5"

bench-faithful: setup ## KL divergence of merged, converted and quantized models from the one that was trained
	python benchmarks/page.py faithful.py

bench-quantize: setup ## size, KL divergence and score of every quantization type, with and without the importance matrix
	python benchmarks/page.py "quantize.py --plot docs/quantization.svg"

bench-convert: llama-server ## conversion and quantization against llama.cpp's own programs: seconds, memory, equal tensors
	python benchmarks/page.py convert.py

bench-data: setup ## speed of preprocess against a plain datasets.map loop, and memory on a million rows
	python benchmarks/page.py data.py "data.py --million"

bench-train: setup ## speed, memory and start-up of training against TRL's and LLaMA-Factory's, on the device at hand
	python benchmarks/page.py "train.py --cases smollm2" "train.py --cases qwen3" "train.py --cases tiny"

bench-cuda: setup ## tests marked gpu, speed and memory of training on a GPU against TRL, in nine minutes
	bash benchmarks/cuda/run.sh

bench-generate: setup ## speed and memory of answers against a plain llama-cpp-python loop and transformers
	python benchmarks/page.py "generate.py --rounds 5 --shared-rows 32"

bench-engine: llama-server ## speed of answers against llama-server and llama-batched-bench, on the same rows
	python benchmarks/page.py engine.py

bench-serve: llama-server ## requests per second and seconds to the first token of both engines of the server
	python benchmarks/page.py serve.py

bench-attention: setup ## speed of decoding on the CPU with llama.cpp's FlashAttention and without
	python benchmarks/page.py attention.py

bench-experiments: setup ## what `dvc exp show` takes with a hundred experiments, and `dvc repro` with nothing to do
	python benchmarks/page.py experiments.py

bench-by-hand: llama-server ## the whole default pipeline against plain scripts of TRL, PEFT and llama.cpp; an hour
	python benchmarks/page.py by_hand.py

bench-growth: setup ## seconds and memory as rows, weights and experiments grow, with a plot
	python benchmarks/page.py "growth.py --plot docs/growth.svg"

bench-memory: setup ## resident memory over 400 steps of a training, after the pipeline has run
	python benchmarks/page.py memory.py

bench-loss: setup ## time and memory of a loss over a real vocabulary, logits held and in TRL's tiles
	python benchmarks/page.py loss.py

bench-pruning: setup ## steps and best score of the default search with the pruner and without, in about an hour
	python benchmarks/page.py pruning.py

bench-intervals: setup ## coverage of intervals, false alarms and power, on simulated data sets
	python benchmarks/page.py intervals.py

bench-studio: setup ## seconds until the studio's overview shows 500 experiments; what a live page costs a training
	python benchmarks/page.py studio.py "studio.py --live"

bench-tracking: setup ## seconds of the training stage while it is mirrored, to a server and to one that hangs
	python benchmarks/page.py tracking.py

bench-classify: setup ## an epoch with kept features and without, and 1,000 texts by torch, ONNX Runtime and scikit-learn
	python benchmarks/page.py classify.py

docs: setup ## rewrite docs/params.md, schemas/, the pictures in docs/, and the tables of results
	python -m lathe schema > docs/params.md
	python -m lathe.experiments.schemas
	python docs/build.py
	python docs/results.py

docs-serve: setup ## show the documentation on http://127.0.0.1:8002, built again as its files change
	NO_MKDOCS_2_WARNING=1 mkdocs serve --dev-addr 127.0.0.1:8002

docs-check: setup ## build the documentation into .site; a dead link fails
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet

clean: ## remove the environment, the converter and what tools cached; data, models and metrics stay
	rm -f .venv/.ready # first: without it, what is left of an environment is not used
	rm -rf .venv .llama.cpp .mypy_cache .ruff_cache .pytest_cache
