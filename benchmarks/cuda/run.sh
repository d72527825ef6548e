#!/usr/bin/env bash
# Tests and measures training on the GPU of this machine, which needs no network: bash benchmarks/cuda/run.sh [OPTION …]
#
# The options are those of benchmarks/cuda/measure.py. `--smoke` runs every step with tiny models, on a CPU too.
set -u -o pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD/src:$PWD/benchmarks:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_WAIT_POLICY=PASSIVE
# Ask the driver's library whether there is a GPU: asking CUDA itself would keep the process from being forked.
export PYTORCH_NVML_BASED_CUDA_CHECK=1
exec "${PYTHON:-python3}" benchmarks/cuda/measure.py "$@"
