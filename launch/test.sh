#!/usr/bin/env bash
# Makes the environment and runs all tests.
#
#   ./launch/test.sh [pytest arguments]      such as: ./launch/test.sh -x tests/conversion
#
# Exit status: pytest's, or 3 to 6 when the set-up failed (see setup_env.sh).

set -euo pipefail
here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

# shellcheck source=setup_env.sh
source "$here/setup_env.sh"
cd -- "$here/.."
exec "$MEGATRON_ADS_VENV/bin/python" -m pytest "$@"
