#!/usr/bin/env bash
# Runs the jobs of tests/slurm on a real Slurm: munge, slurmctld and emulated nodes on this machine, over loopback.
#
#   ./tests/slurm/run.sh [pytest arguments]
#
# Installs Slurm with apt where it is missing and may be installed. Takes some ten minutes on two cores, and gives up
# after half an hour.
#
# Exit status: pytest's; 0 with a reason where there can be no such Slurm; 124 after half an hour.

set -euo pipefail
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)"
packages=(slurmctld slurmd slurm-client munge)

_skip() {
    printf 'slurm tests skipped: %s\n' "$1"
    exit 0
}

[[ "$(id -u)" -eq 0 ]] || _skip "several nodes on one host need root; run this as root, in a container for example."
if ! command -v slurmctld slurmd sbatch munged >/dev/null; then
    command -v apt-get >/dev/null || _skip "Slurm is not installed, and there is no apt-get; install ${packages[*]}."
    export DEBIAN_FRONTEND=noninteractive
    { timeout 300 apt-get update -qq && timeout 600 apt-get install -y -qq --no-install-recommends "${packages[@]}"; } \
        >/dev/null 2>&1 || _skip "apt-get could not install ${packages[*]}; see what 'apt-get install' says."
fi

# shellcheck source=../../launch/setup_env.sh
source "$root/launch/setup_env.sh"
cd -- "$root"
MEGATRON_ADS_SLURM=1 exec timeout 1800 "$MEGATRON_ADS_VENV/bin/python" -m pytest tests/slurm "$@"
