#!/usr/bin/env bash
# Runs tests/engines: rollouts on real inference servers, vLLM's CPU build on this machine, over loopback.
#
#   ./tests/engines/run.sh [pytest arguments]
#
# Makes the environments of the project and, in MEGATRON_ADS_VLLM, of vLLM (3.4 GB) where they are missing. Needs 4 GB
# of memory besides; takes some ten minutes on two idle cores, and gives up after an hour.
#
# Exit status: pytest's; 0 with a reason where vLLM cannot be installed; 3 to 6 when the project's set-up failed; 124
# after an hour.

set -euo pipefail
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)"

"$root/launch/setup_vllm.sh" || {
    printf 'engine tests skipped: there is no vLLM; the line above says why.\n'
    exit 0
}
# shellcheck source=../../launch/setup_env.sh
source "$root/launch/setup_env.sh"
cd -- "$root"
MEGATRON_ADS_ENGINES=1 exec timeout 3600 "$MEGATRON_ADS_VENV/bin/python" -m pytest tests/engines "$@"
