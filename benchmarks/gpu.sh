#!/usr/bin/env bash
# Checks and measures every GPU path on one machine with one GPU (an H100 or H200), without a network, in under ten
# minutes: kernels, layers of DeepSeek-R1's widths, checkpoints, jobs, parity. Steps and results: benchmarks/gpu/runner.py
#
#   benchmarks/gpu.sh [--out DIR] [--seconds 540] [--step NAME ...]
#   benchmarks/gpu.sh --dry-run                  on tiny sizes, on a CPU too: shows that it runs, measures nothing
#
# Where the machine has torch, but not all that this project needs, and no package index: make a folder of wheels on a
# machine with a network, for the Python of the GPU's machine, and take it along.
#
#   benchmarks/gpu.sh --make-wheels DIR [--python 3.12]
#   benchmarks/gpu.sh --wheels DIR [...]
#
# Exit status: 0 every step passed or was skipped, 1 one did not, 2 it could not be started.

set -euo pipefail
MEGATRON_ADS_ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"

_packages=(megatron-core hydra-core omegaconf antlr4-python3-runtime)
_platforms=(manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014)

_make_wheels() { # folder, Python version
    local platform arguments=()
    for platform in "${_platforms[@]}"; do arguments+=(--platform "${platform}_x86_64"); done
    # Has no wheel on the index: it is built here, for any Python.
    python3 -m pip wheel --no-deps -w "$1" -c "$MEGATRON_ADS_ROOT/constraints.txt" antlr4-python3-runtime
    python3 -m pip download --no-deps --only-binary=:all: --implementation cp --python-version "$2" "${arguments[@]}" \
        --find-links "$1" -d "$1" -c "$MEGATRON_ADS_ROOT/constraints.txt" "${_packages[@]}"
}

_usage() {
    awk 'NR > 1 && /^#/ {sub(/^# ?/, ""); print; next} NR > 1 {exit}' "${BASH_SOURCE[0]}"
    exit "$1"
}

wheels="" made="" version="3.12" out="runs/gpu" passed_on=()
while (($#)); do
    case "$1" in
    --wheels | --make-wheels | --python | --out)
        [[ $# -ge 2 ]] || _usage 2
        case "$1" in --wheels) wheels="$2" ;; --make-wheels) made="$2" ;; --python) version="$2" ;; --out) out="$2" ;; esac
        shift 2
        ;;
    -h | --help) _usage 0 ;;
    *)
        passed_on+=("$1")
        shift
        ;;
    esac
done
if [[ -n "$made" ]]; then
    _make_wheels "$made" "$version"
    exit
fi

scratch="$(mktemp -d)"
trap 'rm -rf -- "$scratch"' EXIT
if [[ -n "$wheels" ]]; then
    python3 -m pip install -q --no-index --no-deps --no-compile --target "$scratch/site" "$wheels"/*.whl || exit 2
    export PYTHONPATH="$scratch/site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$MEGATRON_ADS_ROOT${PYTHONPATH:+:$PYTHONPATH}"
# Compiled kernels are shared by the steps, each of which is a process of its own.
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$scratch/triton}" TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$scratch/inductor}"
# shellcheck source=../launch/environment.sh
source "$MEGATRON_ADS_ROOT/launch/environment.sh"
[[ "$out" == /* ]] || out="$PWD/$out"
cd -- "$MEGATRON_ADS_ROOT"
"$MEGATRON_ADS_RUN_PYTHON" -m benchmarks.gpu --out "$out" ${passed_on[@]+"${passed_on[@]}"}
