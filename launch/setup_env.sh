#!/usr/bin/env bash
# Makes the Python environment of this project, or re-uses it when it is up to date.
# The other launch scripts source it; it can also be run alone. It may be run twice at the same time,
# and a set-up that was interrupted is done again from the start.
#
# Settings, all optional, from the environment:
#   MEGATRON_ADS_VENV         where the environment is made                     (default: .venv next to setup.py)
#   MEGATRON_ADS_PYTHON       the Python to make it with, 3.11 to 3.13          (default: the first one found)
#   MEGATRON_ADS_TORCH_INDEX  package index to take torch from, such as https://download.pytorch.org/whl/cpu
#                             for the small build without CUDA                  (default: pip's own)
#
# Exit status: 0 ready, 3 no suitable Python, 4 not enough disk space, 5 a package could not be downloaded or
# installed, 6 another set-up did not end in time, 130 interrupted.

set -euo pipefail

MEGATRON_ADS_ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
MEGATRON_ADS_VENV="${MEGATRON_ADS_VENV:-$MEGATRON_ADS_ROOT/.venv}"

_needed_mb=4000
_lock_seconds=1800
_stamp="$MEGATRON_ADS_VENV/.megatron-ads-stamp"
_unfinished="$MEGATRON_ADS_VENV/.megatron-ads-unfinished"
_log="$MEGATRON_ADS_VENV.log"

_die() { # status, message
    printf 'set-up: %s\n' "$2" >&2
    exit "$1"
}

_say() { printf 'set-up: %s\n' "$1"; }

_is_suitable_python() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1
}

_find_python() {
    local candidate
    if [[ -n "${MEGATRON_ADS_PYTHON:-}" ]]; then
        _is_suitable_python "$MEGATRON_ADS_PYTHON" || _die 3 "MEGATRON_ADS_PYTHON is $MEGATRON_ADS_PYTHON ($(
            _version_of "$MEGATRON_ADS_PYTHON"
        )), but Python 3.11 to 3.13 is needed; set it to one, or leave it unset."
        printf '%s\n' "$MEGATRON_ADS_PYTHON"
        return
    fi
    for candidate in python3.11 python3 python3.12 python3.13; do
        if _is_suitable_python "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    _die 3 "Python 3.11 to 3.13 is needed, but python3 is $(_version_of python3); install it (Debian: apt-get install python3.11 python3.11-venv) or name one in MEGATRON_ADS_PYTHON."
}

_version_of() {
    "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null || printf 'not there'
}

_check_disk() {
    local folder="$MEGATRON_ADS_VENV" free_mb
    while [[ ! -d "$folder" ]]; do folder="$(dirname -- "$folder")"; done
    free_mb="$(df -Pm -- "$folder" | awk 'NR == 2 {print $4}')"
    [[ "$free_mb" -ge "$_needed_mb" ]] ||
        _die 4 "installing needs $_needed_mb MB of disk space, but $folder has $free_mb MB free; free some, or set MEGATRON_ADS_VENV to a folder on another disk."
}

_wanted_stamp() {
    { cat -- "$MEGATRON_ADS_ROOT/constraints.txt" "$MEGATRON_ADS_ROOT/setup.py"; printf '%s\n' "$MEGATRON_ADS_ROOT" "$1"; } |
        sha256sum | cut -d ' ' -f 1
}

_is_up_to_date() {
    [[ -f "$_stamp" && ! -e "$_unfinished" ]] && _is_suitable_python "$MEGATRON_ADS_VENV/bin/python" &&
        [[ "$(<"$_stamp")" == "$(_wanted_stamp "$(_version_of "$MEGATRON_ADS_VENV/bin/python")")" ]]
}

_make_environment() {
    local python
    if [[ -e "$_unfinished" ]]; then
        _say "an earlier set-up was interrupted; starting again"
        rm -rf -- "$MEGATRON_ADS_VENV"
    fi
    if _is_suitable_python "$MEGATRON_ADS_VENV/bin/python"; then
        : >"$_unfinished"
        return
    fi
    python="$(_find_python)"
    _say "making $MEGATRON_ADS_VENV with Python $(_version_of "$python")"
    { mkdir -p -- "$MEGATRON_ADS_VENV" && : >"$_unfinished"; } 2>>"$_log" ||
        _die 4 "$MEGATRON_ADS_VENV cannot be written; set MEGATRON_ADS_VENV to a folder that can."
    "$python" -m venv "$MEGATRON_ADS_VENV" >>"$_log" 2>&1 ||
        _die 3 "Python's venv module does not work ($(_last_error)); on Debian: apt-get install python3-venv."
}

_pip_install() { # what, pip arguments
    local what="$1" started=$SECONDS
    shift
    _say "installing $what"
    "$MEGATRON_ADS_VENV/bin/python" -m pip --disable-pip-version-check install --no-input \
        -c "$MEGATRON_ADS_ROOT/constraints.txt" "$@" >>"$_log" 2>&1 || _explain_pip_failure "$what"
    _say "installed $what in $((SECONDS - started)) s"
}

_explain_pip_failure() {
    if grep -qi 'no space left on device' -- "$_log"; then
        _die 4 "the disk became full while installing $1; free $_needed_mb MB, or set MEGATRON_ADS_VENV to a folder on another disk."
    fi
    if grep -qiE 'connection broken|connection refused|name resolution|timed out' -- "$_log"; then
        _die 5 "$1 could not be downloaded: the package index did not answer. Check the network and pip's settings (pip config list), then start again; all that pip said is in $_log."
    fi
    _die 5 "$1 could not be installed: $(_last_error) (all that pip said is in $_log). Fix that, then start again."
}

_last_error() { # the first complaint of the last pip run, in one line
    { grep -E '^(ERROR|error|Error)' -- "$_log" || tail -n 1 -- "$_log"; } | head -n 1 | cut -c -300
}

_set_up() {
    : >"$_log" 2>/dev/null || _die 4 "$_log cannot be written; set MEGATRON_ADS_VENV to a folder that can."
    _check_disk
    _make_environment
    # torch first, at the exact version of the constraints: a looser request, made by another package, may take a
    # build of several GB. setuptools builds what has no wheel.
    _pip_install "torch" ${MEGATRON_ADS_TORCH_INDEX:+--extra-index-url "$MEGATRON_ADS_TORCH_INDEX"} torch setuptools
    _pip_install "the other packages" --use-pep517 --no-build-isolation -e "${MEGATRON_ADS_ROOT}[dev]"
    _wanted_stamp "$(_version_of "$MEGATRON_ADS_VENV/bin/python")" >"$_stamp.partial"
    mv -- "$_stamp.partial" "$_stamp"
    rm -f -- "$_unfinished"
    _say "ready: $MEGATRON_ADS_VENV"
}

_set_up_once() {
    mkdir -p -- "$(dirname -- "$MEGATRON_ADS_VENV")" 2>/dev/null || true
    { exec 9>"$MEGATRON_ADS_VENV.lock"; } 2>/dev/null ||
        _die 4 "$MEGATRON_ADS_VENV.lock cannot be written; set MEGATRON_ADS_VENV to a folder that can."
    if ! flock -n 9; then
        _say "waiting for another set-up of $MEGATRON_ADS_VENV"
        flock -w "$_lock_seconds" 9 || _die 6 "another set-up of $MEGATRON_ADS_VENV did not end in $_lock_seconds s; end it, then start again."
    fi
    _is_up_to_date || _set_up
    exec 9>&-
}

trap '_die 130 "interrupted; start again to finish"' INT TERM
_set_up_once
trap - INT TERM
