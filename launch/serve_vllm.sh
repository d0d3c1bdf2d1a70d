#!/usr/bin/env bash
# Starts vLLM's CPU build on a checkpoint, in place of the server that this script started on the same port before, and
# returns when it answers. As rollout.reload_command it needs no arguments: a job puts MODEL, URL and SERVED_MODEL
# into its environment.
#
#   ./launch/serve_vllm.sh MODEL PORT           such as: ./launch/serve_vllm.sh runs/demo 8000
#   ./launch/serve_vllm.sh --stop PORT
#
# Settings, all optional, from the environment:
#   MEGATRON_ADS_VLLM            the environment that setup_vllm.sh made        (default: .venv-vllm next to setup.py)
#   MEGATRON_ADS_VLLM_RUN        folder of the server's log and process id      (default: the environment's run/)
#   MEGATRON_ADS_VLLM_SECONDS    longest wait for the server to answer          (default: 600)
#   MEGATRON_ADS_VLLM_ARGUMENTS  of `vllm serve`, besides those below           (default: --max-model-len 512
#                                --max-num-seqs 16)
#   SERVED_MODEL                 name that the server knows the model by        (default: policy)
#
# Exit status: 0 it answers, 2 wrong arguments, 3 no environment, 4 it ended, did not answer in time, or another server
# has the port.

set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
vllm="${MEGATRON_ADS_VLLM:-$root/.venv-vllm}"
run="${MEGATRON_ADS_VLLM_RUN:-$vllm/run}"
seconds="${MEGATRON_ADS_VLLM_SECONDS:-600}"
model="${1:-${MODEL:-}}"
port="${2:-}"
if [[ -z "$port" && "${URL:-}" =~ ^https?://[^/]*:([0-9]+)(/|$) ]]; then port="${BASH_REMATCH[1]}"; fi
pid_file="$run/$port.pid"
log="$run/$port.log"

die() { # status, message
    printf 'vLLM: %s\n' "$2" >&2
    exit "$1"
}

started_at() { ps -o lstart= -p "$1" 2>/dev/null || true; }

stop() { # the server and its workers, which outlive it when it is killed: one session with the server's number
    local pid when signal
    [[ -f "$pid_file" ]] || return 0
    { read -r pid && read -r when; } <"$pid_file" || true
    # Another process may have the number by now; while a worker lives, none gets it.
    if [[ -z "$(started_at "$pid")" || "$(started_at "$pid")" == "$when" ]]; then
        for signal in TERM KILL; do
            for _ in {1..50}; do
                mapfile -t alive < <(ps -o pid= --sid "$pid" | tr -d ' ')
                [[ ${#alive[@]} -gt 0 ]] || break 2
                kill "-$signal" "${alive[@]}" 2>/dev/null || true
                sleep 0.2
            done
        done
    fi
    rm -f -- "$pid_file"
}

answers() { # the first line of what /health says
    timeout 5 bash -c 'exec 3<>"/dev/tcp/127.0.0.1/$0" && printf "GET /health HTTP/1.0\r\n\r\n" >&3 && head -n 1 <&3' \
        "$port" 2>/dev/null | grep -q ' 200 '
}

[[ -n "$model" && "$port" =~ ^[0-9]+$ ]] || die 2 "a model's folder and a port are needed: serve_vllm.sh MODEL PORT."
if [[ "$model" == --stop ]]; then
    stop
    exit 0
fi
[[ -x "$vllm/bin/vllm" ]] || die 3 "there is no vLLM in $vllm; run launch/setup_vllm.sh, or name it in MEGATRON_ADS_VLLM."
[[ -f "$model/config.json" ]] || die 2 "$model is no Hugging Face folder: it has no config.json."
mkdir -p -- "$run"
stop
# Its answers would be taken for those of the server that is started, which cannot have the port.
if answers; then die 4 "another server answers on port $port; end it, or choose another port."; fi

# The CPU build's MLA kernel takes few head sizes: without it MLA is computed as ordinary attention. Development mode
# has the requests that load weights from a folder. Without an address vLLM picks a network interface of its own.
export VLLM_MLA_DISABLE=1 VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}" VLLM_SERVER_DEV_MODE=1
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 VLLM_HOST_IP=127.0.0.1 GLOO_SOCKET_IFNAME=lo
# The compiled rotary embedding of 0.32.0 is wrong on a CPU where a model has plain RoPE (no rope_scaling): answers of
# other weights, and other ones each time.
rotary='{"custom_ops": ["-rotary_embedding"]}'
read -ra arguments <<<"${MEGATRON_ADS_VLLM_ARGUMENTS:---max-model-len 512 --max-num-seqs 16}"
setsid "$vllm/bin/vllm" serve "$model" --host 127.0.0.1 --port "$port" --served-model-name "${SERVED_MODEL:-policy}" \
    --generation-config vllm --dtype float32 --enforce-eager --compilation-config "$rotary" "${arguments[@]}" >"$log" 2>&1 </dev/null &
pid=$!
printf '%s\n%s\n' "$pid" "$(started_at "$pid")" >"$pid_file"

until answers; do
    kill -0 "$pid" 2>/dev/null || die 4 "the server on $model ended: $(tail -n 1 -- "$log") (more in $log)."
    if ((SECONDS > seconds)); then
        stop
        die 4 "the server on $model did not answer in $seconds s; its log is $log."
    fi
    sleep 0.5
done
