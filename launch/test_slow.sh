#!/usr/bin/env bash
# Makes the environment and runs the slow tests, which test.sh leaves out: jobs that are stopped, killed, started again or
# run out of disk, every published model through every command, and what Megatron-Core itself does wrong.
#
#   ./launch/test_slow.sh [pytest arguments]      such as: ./launch/test_slow.sh -k divergence
#
# Not part of any automatic check but a full release_check.sh: run it before a release.
#
# Exit status: that of test.sh.

set -euo pipefail
exec "$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)/test.sh" -m slow "$@"
