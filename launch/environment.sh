#!/usr/bin/env bash
# The environment of a training job. torchrun.sh and slurm.sbatch source it; what is set already stays as it is.

set_default() { # name, value
    if [[ -z "${!1+set}" ]]; then export "$1=$2"; fi
}

# One hardware queue: a communication that was issued before a kernel starts before it. Megatron's overlap of
# tensor-parallel communication with computation relies on that order.
set_default CUDA_DEVICE_MAX_CONNECTIONS 1

# Memory segments that can grow: sequences are packed and experts get a varying share of the tokens, and blocks of
# varying sizes fragment a card of which 90 % are in use.
set_default PYTORCH_CUDA_ALLOC_CONF expandable_segments:True

# A failed or overdue collective ends the process, so that the launcher can start again, instead of hanging on.
set_default TORCH_NCCL_ASYNC_ERROR_HANDLING 1

# torch remembers the last collectives of every rank and writes them down when one is overdue: which one it was, and
# who had not come.
set_default TORCH_FR_BUFFER_SIZE 2000
set_default TORCH_NCCL_DUMP_ON_TIMEOUT 1

# NCCL says what went wrong, and nothing else.
set_default NCCL_DEBUG WARN

# Tensors on their way through NCCL are not held back until the next use of their stream: a pipeline has many of them.
set_default TORCH_NCCL_AVOID_RECORD_STREAMS 1

# One thread for the CPU work of a rank on a GPU; without it each of 8 ranks a node starts one per core. Runs on a CPU
# set runtime.threads.
set_default OMP_NUM_THREADS 1

# Tokenizers start threads of their own, which a fork for data loading would break.
set_default TOKENIZERS_PARALLELISM false

# A rank's lines reach its log when they are written: the last ones before a crash are those that matter.
set_default PYTHONUNBUFFERED 1

# The Python to run with: the named environment, else the active one, else the project's own.
if [[ -n "${MEGATRON_ADS_VENV:-}" ]]; then
    MEGATRON_ADS_RUN_PYTHON="$MEGATRON_ADS_VENV/bin/python"
elif [[ -n "${VIRTUAL_ENV:-}" ]]; then
    MEGATRON_ADS_RUN_PYTHON="$VIRTUAL_ENV/bin/python"
elif [[ -x "$MEGATRON_ADS_ROOT/.venv/bin/python" ]]; then
    MEGATRON_ADS_RUN_PYTHON="$MEGATRON_ADS_ROOT/.venv/bin/python"
else
    MEGATRON_ADS_RUN_PYTHON="$(command -v python3 || true)"
fi
if ! answer="$(cd -- "$MEGATRON_ADS_ROOT" && "${MEGATRON_ADS_RUN_PYTHON:-python3}" -c '
import sys
sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)
' 2>&1 && "$MEGATRON_ADS_RUN_PYTHON" -c 'import megatron_ads.config' 2>&1)"; then
    printf 'launch: %s cannot run megatron-ads (%s). Make an environment with ./launch/setup_env.sh, or name one in MEGATRON_ADS_VENV.\n' \
        "${MEGATRON_ADS_RUN_PYTHON:-python3}" "${answer##*$'\n'}" >&2
    exit 2
fi
