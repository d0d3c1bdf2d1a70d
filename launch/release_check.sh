#!/usr/bin/env bash
# Checks everything that is checked before a release, and writes one page to sign: tests, parity ladder, conversion both
# ways, public benchmarks and ads tasks before and after it, speed; without --quick also what takes hours.
#
#   ./launch/release_check.sh [--hf DIR] [--quick] [--out DIR]
#
#   --hf DIR     Hugging Face folder to check     (default: a small random checkpoint)
#   --quick      what can be seen in half an hour on two cores; the page says what was left out
#   --out DIR    where everything is written      (default: runs/release)
#
# With MEGATRON_ADS_DATA naming a folder with gsm8k, humaneval or mmlu_stem, public benchmarks are asked. A part that
# fails does not stop the others. Interrupted, it continues when it is started again: what has passed is kept while code,
# versions and checkpoint are the same. The page is OUT/release.html.
#
# Exit status: 0 all that was run has passed, 1 something failed, 2 it could not be carried out, 3 to 6 the set-up failed
# (see setup_env.sh), 130 interrupted.

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
# The folders that are named stay those of the caller; the modules are found next to this folder.
PYTHONPATH="$MEGATRON_ADS_ROOT${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" \
    exec "$MEGATRON_ADS_VENV/bin/python" -m parity_tests.release_check "$@"
