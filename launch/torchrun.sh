#!/usr/bin/env bash
# Runs a recipe under torchrun, on this machine or on several:
#
#   ./launch/torchrun.sh RECIPE [key=value ...]
#
# On several machines, start it on each with the same arguments, all folders on shared storage, and in the environment:
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 ./launch/torchrun.sh RECIPE [key=value ...]      # NODE_RANK=1 on the other
#
# After a failure all ranks start again from the last checkpoint; a machine that was lost joins again when this is started
# there again. SIGTERM, SIGUSR1 and Ctrl-C save a checkpoint and stop; the same command continues from there.
#
# Settings, all optional, from the environment:
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   the machines and where they meet          (default: this one alone)
#   NPROC_PER_NODE             ranks on each machine                   (default: as few in all as the layout needs)
#   MEGATRON_ADS_MAX_RESTARTS  restarts after failures before it gives up                               (default: 3)
#   MEGATRON_ADS_VENV          the Python environment                (default: the active one, else the project's)
#
# Exit status: 0 done, 1 failed, 2 something has to be fixed first, 75 stopped with a checkpoint,
#   77 diverged: nothing is learned any more, and nothing exported.

set -euo pipefail
MEGATRON_ADS_ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"

if [[ $# -eq 0 || "$1" == -* || "$1" == *=* ]]; then
    awk 'NR > 1 && /^#/ {sub(/^# ?/, ""); print; next} NR > 1 {exit}' "${BASH_SOURCE[0]}"
    [[ "${1:-}" == -h || "${1:-}" == --help ]] && exit 0
    exit 2
fi

# shellcheck source=environment.sh
source "$MEGATRON_ADS_ROOT/launch/environment.sh"
export MEGATRON_ADS_MAX_RESTARTS="${MEGATRON_ADS_MAX_RESTARTS:-3}"
export PYTHONPATH="$MEGATRON_ADS_ROOT${PYTHONPATH:+:$PYTHONPATH}"
recipe="$1"
shift
exec "$MEGATRON_ADS_RUN_PYTHON" -m megatron_ads.cli train --recipe "$recipe" "$@"
