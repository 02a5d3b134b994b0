#!/usr/bin/env bash
# A real Slurm on this machine, private to one folder: own munge key, own ports, nothing of the machine's own set-up used.
#
#   bash tests/slurm/cluster.sh install            packages by apt-get, as root on Debian or Ubuntu; nothing if they are there
#   bash tests/slurm/cluster.sh missing            names the programs that are not installed
#   bash tests/slurm/cluster.sh start DIR [NODES]  nodes n1, n2, ... on this machine (2); then: export SLURM_CONF=DIR/slurm.conf
#   bash tests/slurm/cluster.sh stop DIR           ends what was started, by its pid files
#
# Works without systemd. DIR must not lie below a folder that others may write to, the sticky /tmp excepted: munge refuses.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin

fail() {
    echo "cluster: $*" >&2
    exit 1
}

missing() {
    local program
    for program in slurmctld slurmd sbatch munged; do
        command -v "$program" >/dev/null || echo "$program"
    done
}

install_packages() {
    [[ -n $(missing) ]] || return 0
    echo "cluster: installing Slurm for tests/slurm"
    ((EUID == 0)) || fail "not installed: $(missing | xargs); install slurmctld, slurmd, slurm-client and munge"
    command -v apt-get >/dev/null || fail "not installed: $(missing | xargs), and there is no apt-get here"
    local packages=(slurmctld slurmd slurm-client munge shellcheck)
    export DEBIAN_FRONTEND=noninteractive
    timeout 120 apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null 2>&1 && return
    # Package lists may be old or absent.
    timeout 120 apt-get update -qq >/dev/null 2>&1 || fail "apt-get update failed: package archives out of reach?"
    timeout 180 apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null || fail "apt-get install failed"
}

free_ports() {
    python3 - "$1" <<'PYTHON'
import socket, sys

sockets = [socket.socket() for _ in range(int(sys.argv[1]))]
for one in sockets:
    one.bind(("127.0.0.1", 0))
print(*(one.getsockname()[1] for one in sockets))
PYTHON
}

write_conf() {
    local nodes=$1 host user ports number
    host=$(hostname -s)
    user=$(id -un)
    read -ra ports < <(free_ports $((nodes + 1)))
    cat <<CONF
ClusterName=tests
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
CryptoType=crypto/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/pids/slurmctld
SlurmdPidFile=$dir/pids/slurmd_%n
SlurmctldLogFile=$dir/log/slurmctld
SlurmdLogFile=$dir/log/slurmd_%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
MpiDefault=none
ReturnToService=0
KillWait=5
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2
# Jobs of the second partition take nodes from those of the first, which are told a minute before.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=tests Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
CONF
    for ((number = 1; number <= nodes; number++)); do
        echo "NodeName=n$number NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[number]} CPUs=2 RealMemory=4000"
    done
}

start() {
    local nodes=${1:-2} number deadline
    [[ -z $(missing) ]] || fail "not installed: $(missing | xargs)"
    umask 022
    chmod 755 "$dir" # munge asks that everyone may reach its socket
    mkdir -p "$dir"/{munge,state,pids,log,spool}
    for ((number = 1; number <= nodes; number++)); do mkdir -p "$dir/spool/n$number"; done
    (umask 077 && head -c 128 /dev/urandom >"$dir/munge/key")
    write_conf "$nodes" >"$dir/slurm.conf"
    export SLURM_CONF=$dir/slurm.conf
    munged --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/pids/munged" \
        --log-file="$dir/munge/log" --seed-file="$dir/munge/seed"
    slurmctld
    for ((number = 1; number <= nodes; number++)); do slurmd -N "n$number"; done
    deadline=$((SECONDS + 30))
    until [[ $(sinfo --noheader --Node --partition=tests --format=%t 2>/dev/null | grep -c '^idle$') == "$nodes" ]]; do
        ((SECONDS < deadline)) || fail "not all nodes became idle in 30 s; see $dir/log"
        sleep 0.2
    done
}

stop() {
    local file pid deadline
    if [[ -f $dir/slurm.conf ]]; then
        SLURM_CONF=$dir/slurm.conf timeout 10 scancel --quiet --user="$(id -un)" 2>/dev/null || true
        deadline=$((SECONDS + 15))
        while [[ -n $(SLURM_CONF=$dir/slurm.conf timeout 5 squeue --noheader 2>/dev/null) ]] && ((SECONDS < deadline)); do
            sleep 0.5
        done
    fi
    # munged last: the others need it to the end.
    for file in "$dir"/pids/slurmd_* "$dir/pids/slurmctld" "$dir/pids/munged"; do
        [[ -f $file ]] || continue
        pid=$(<"$file")
        kill "$pid" 2>/dev/null || continue
        deadline=$((SECONDS + 10))
        while kill -0 "$pid" 2>/dev/null; do
            ((SECONDS < deadline)) || { kill -KILL "$pid" 2>/dev/null || true; }
            sleep 0.1
        done
    done
}

action=${1:-}
if [[ $action == start || $action == stop ]]; then
    [[ -n ${2:-} ]] || fail "which folder? bash tests/slurm/cluster.sh $action DIR"
    mkdir -p "$2"
    dir=$(cd "$2" && pwd)
fi
case $action in
    install) install_packages ;;
    missing) missing ;;
    start) start "${3:-2}" ;;
    stop) stop ;;
    *) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" && exit 2 ;;
esac
