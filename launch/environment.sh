#!/usr/bin/env bash
# The environment of a training job: torchrun.sh and slurm.sbatch source it, with MEGATRON_ADS_ROOT set. What is set
# already stays as it is. Afterwards MEGATRON_ADS_RUN_PYTHON is the Python to run with.

_set_default() { # name, value
    if [[ -z "${!1+set}" ]]; then export "$1=$2"; fi
}

# Compiled kernels, on a disk of each node: the ranks of many nodes would wait for each other's locks on a shared one.
_set_default TRITON_CACHE_DIR "${TMPDIR:-/tmp}/triton-$(id -u)"

# Memory segments that can grow: experts get a varying share of the tokens, and blocks of varying sizes would fragment
# a card that is nearly full.
_set_default PYTORCH_CUDA_ALLOC_CONF expandable_segments:True

# torch remembers the last collectives of every rank, and writes them down when one is overdue: which one it was, and
# who had not come.
_set_default TORCH_FR_BUFFER_SIZE 2000
_set_default TORCH_NCCL_DUMP_ON_TIMEOUT 1

# NCCL says what goes wrong, and nothing else.
_set_default NCCL_DEBUG WARN

# One thread for what a rank on a GPU computes on the CPU; without it each of the 8 ranks of a node starts one per core.
# Ranks on a CPU take runtime.threads instead.
_set_default OMP_NUM_THREADS 1

# Tokenizers would start threads of their own in addition to those of the data loading.
_set_default TOKENIZERS_PARALLELISM false

# A rank's lines reach its log when they are written: the last ones before a crash are those that matter.
_set_default PYTHONUNBUFFERED 1

_find_run_python() { # the named environment, else the active one, else the project's, else the one on the path
    local folder answer
    for folder in "${MEGATRON_ADS_VENV:-}" "${VIRTUAL_ENV:-}" "$MEGATRON_ADS_ROOT/.venv"; do
        if [[ -n "$folder" && (-x "$folder/bin/python" || "$folder" == "${MEGATRON_ADS_VENV:-}") ]]; then
            MEGATRON_ADS_RUN_PYTHON="$folder/bin/python"
            break
        fi
    done
    MEGATRON_ADS_RUN_PYTHON="${MEGATRON_ADS_RUN_PYTHON:-python3}"
    answer="$(cd -- "$MEGATRON_ADS_ROOT" && "$MEGATRON_ADS_RUN_PYTHON" -c '
import sys
if sys.version_info < (3, 11):
    sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0])
import megatron_ads.config.recipes' 2>&1)" && return
    printf 'launch: %s cannot run megatron-ads (%s). Make an environment with ./launch/setup_env.sh, or name one in MEGATRON_ADS_VENV.\n' \
        "$MEGATRON_ADS_RUN_PYTHON" "${answer##*$'\n'}" >&2
    exit 2
}

_find_run_python
