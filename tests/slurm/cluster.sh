#!/usr/bin/env bash
# A real Slurm cluster on this machine, over loopback and without systemd: N emulated nodes on one host.
#
#   tests/slurm/cluster.sh up DIR NODES CPUS_PER_NODE [GPUS_PER_NODE]
#   tests/slurm/cluster.sh down DIR
#
# Afterwards "export SLURM_CONF=DIR/slurm.conf" lets sbatch, srun and scontrol find it. GPUs are empty files that Slurm
# counts. Partition "low" can be preempted by partition "high", with 10 s of grace. "down" ends the jobs first. Needs
# root and the packages slurmctld, slurmd, slurm-client and munge. PORTBASE (default 17000): the first of NODES + 12
# ports.

set -euo pipefail
action="${1:?up or down}"
folder="${2:?a folder}"

down() {
    local pid
    [[ -f "$folder/pids" ]] || return 0
    export SLURM_CONF="$folder/slurm.conf"
    timeout 10 scancel --user=root 2>/dev/null || true
    for _ in $(seq 60); do # what a job leaves running would report to the next cluster
        [[ -n "$(timeout 10 squeue --noheader 2>/dev/null)" ]] || break
        sleep 0.5
    done
    for pid in $(tac "$folder/pids"); do kill "$pid" 2>/dev/null || true; done
    for _ in $(seq 20); do
        sleep 0.25
        # shellcheck disable=SC2046
        kill -0 $(<"$folder/pids") 2>/dev/null || break
    done
    for pid in $(<"$folder/pids"); do kill -9 "$pid" 2>/dev/null || true; done
    rm -f -- "$folder/pids"
}

start() { # log name, command: in the background, remembered for "down"
    local name="$1"
    shift
    setsid "$@" >"$folder/log/$name.out" 2>&1 </dev/null &
    echo $! >>"$folder/pids"
}

configuration() { # nodes, cpus, gpus
    local port="${PORTBASE:-17000}" gres="" index
    cat <<END
ClusterName=emulated
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.sock
CryptoType=crypto/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$folder/log/jobcomp.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdParameters=config_overrides
MpiDefault=none
KillWait=5
MessageTimeout=30
SlurmdTimeout=30
JobRequeue=1
END
    if [[ "$3" -gt 0 ]]; then
        echo "GresTypes=gpu"
        gres="Gres=gpu:$3"
    fi
    for index in $(seq "$1"); do
        echo "NodeName=n$index NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=$((port + 10 + index)) CPUs=$2 RealMemory=4000 $gres State=UNKNOWN"
    done
    echo "PartitionName=low Nodes=ALL Default=YES MaxTime=60 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=10"
    echo "PartitionName=high Nodes=ALL MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF"
}

up() { # nodes, cpus, gpus
    local index
    mkdir -p "$folder"/{state,spool,log,dev}
    chmod 755 "$folder"
    (umask 077 && head -c 128 /dev/urandom >"$folder/munge.key")
    start munged munged --force --foreground --key-file="$folder/munge.key" --socket="$folder/munge.sock" \
        --pid-file="$folder/munged.pid" --log-file="$folder/log/munged.log" --seed-file="$folder/munge.seed"
    configuration "$@" >"$folder/slurm.conf"
    if [[ "$3" -gt 0 ]]; then
        for index in $(seq 0 $(($3 - 1))); do : >"$folder/dev/gpu$index"; done
        echo "Name=gpu File=$folder/dev/gpu[0-$(($3 - 1))]" >"$folder/gres.conf"
    fi
    sleep 0.5
    export SLURM_CONF="$folder/slurm.conf"
    start slurmctld slurmctld -D -f "$SLURM_CONF"
    for index in $(seq "$1"); do
        mkdir -p "$folder/spool/n$index"
        start "slurmd.n$index" slurmd -D -N "n$index" -f "$SLURM_CONF"
    done
    for _ in $(seq 60); do
        sinfo -h -p low -o '%T %D' 2>/dev/null | grep -qx "idle $1" && return
        sleep 0.5
    done
    echo "the cluster did not come up in 30 s; see $folder/log" >&2
    down
    exit 1
}

case "$action" in
up) up "${3:?number of nodes}" "${4:?CPUs per node}" "${5:-0}" ;;
down) down ;;
*) echo "usage: cluster.sh up DIR NODES CPUS [GPUS] | down DIR" >&2 && exit 2 ;;
esac
