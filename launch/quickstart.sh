#!/usr/bin/env bash
# The main job in small, on any machine: makes the environment, then a small random DeepSeek-V3-family checkpoint,
# converts it, fine-tunes it on 4 processes, exports it and compares it with transformers. Takes minutes.
#
#   ./launch/quickstart.sh [--out DIR] [--steps N] [--rl N] [...]
#
#   --out DIR    where everything is written      (default: runs/quickstart)
#   --steps N    optimizer steps of the fine-tuning
#   --rl N       then N steps of reinforcement learning (GRPO)
#   ...          the other options of "megatron-ads quickstart"; after the set-up, --help lists them all
#
# With MEGATRON_ADS_DATA naming a folder with esci_us/pairs.jsonl, real query-product pairs are used; otherwise rows
# of a simulated ads business. Interrupted, it continues when it is started again.
#
# Exit status: 0 done, 1 a check failed, 2 it could not be carried out, 3 to 6 the set-up failed (see setup_env.sh).

set -euo pipefail
here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

for argument in "$@"; do
    if [[ "$argument" == -h || "$argument" == --help ]]; then
        awk 'NR > 1 && /^#/ {sub(/^# ?/, ""); print; next} NR > 1 {exit}' "${BASH_SOURCE[0]}"
        exit 0
    fi
done

# shellcheck source=setup_env.sh
source "$here/setup_env.sh"
exec "$MEGATRON_ADS_VENV/bin/megatron-ads" quickstart "$@"
