#!/usr/bin/env bash
# A real SLURM on this machine: munged, slurmctld and several slurmd, without systemd and without root.
#
#   cluster.sh start DIR [NODES [OWNER]]  start it; everything that it writes is in DIR; export SLURM_CONF=DIR/slurm.conf;
#                                    it stops by itself when the process number OWNER is gone
#   cluster.sh stop DIR              end every process of it
#   cluster.sh kill-node DIR NAME    kill -9 a slurmd and the steps that it runs, as a power cut would
#   cluster.sh start-node DIR NAME   start it again
set -euo pipefail
PATH="$PATH:/usr/sbin:/sbin"

main() {
  local action="${1:?start, stop, kill-node or start-node}" directory="${2:?a directory}"
  shift 2
  mkdir -p "$directory"
  directory="$(cd "$directory" && pwd)"
  export SLURM_CONF="$directory/slurm.conf"
  case "$action" in
    start) start "$directory" "${1:-2}" "${2:-}" ;;
    stop) stop "$directory" ;;
    watch) watch "$directory" "${1:?a process number}" ;;
    kill-node) kill_node "$directory" "${1:?a node}" ;;
    start-node) start_node "$directory" "${1:?a node}" ;;
    *)
      echo "error: $action is no action; start, stop, kill-node or start-node" >&2
      return 2
      ;;
  esac
}

start() {
  local directory="$1" nodes="$2" owner="$3" node
  mkdir -p "$directory"/{state,spool,log,munge}
  if [ -n "$owner" ]; then
    setsid "$(realpath "$0")" watch "$directory" "$owner" </dev/null >/dev/null 2>&1 &
    echo $! >"$directory/watcher"
  fi
  chmod 700 "$directory/munge" # munged refuses a key that others could read
  (umask 077 && dd if=/dev/urandom of="$directory/munge/key" bs=1024 count=1 status=none)
  munged --force --socket "$directory/munge/socket" --key-file "$directory/munge/key" --num-threads 2 \
    --pid-file "$directory/munge/pid" --log-file "$directory/munge/log" --seed-file "$directory/munge/seed"
  write_configuration "$directory" "$nodes"
  slurmctld -c -f "$SLURM_CONF"
  for ((node = 0; node < nodes; node++)); do
    start_node "$directory" "n$node"
  done
  wait_until_idle "$nodes"
}

write_configuration() {
  local directory="$1" nodes="$2" node user host
  local -a ports
  user="$(id -un)"
  host="$(hostname -s)"
  mapfile -t ports < <(free_ports $((nodes + 1)))
  cat >"$directory/cgroup.conf" <<END
CgroupPlugin=cgroup/v1
ConstrainCores=no
ConstrainRAMSpace=no
ConstrainDevices=no
END
  cat >"$directory/slurm.conf" <<END
ClusterName=tests
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$directory/munge/socket
CryptoType=crypto/munge
StateSaveLocation=$directory/state
SlurmdSpoolDir=$directory/spool/%n
TmpFS=$directory/tmp/%n
SlurmctldPidFile=$directory/state/slurmctld.pid
SlurmdPidFile=$directory/spool/%n.pid
SlurmctldLogFile=$directory/log/slurmctld.log
SlurmdLogFile=$directory/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=3
SlurmctldTimeout=10
InactiveLimit=0
KillWait=20
MinJobAge=3600
MessageTimeout=10
TreeWidth=16
END
  for ((node = 0; node < nodes; node++)); do
    echo "NodeName=n$node NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[node + 1]} CPUs=4 RealMemory=8000" \
      >>"$directory/slurm.conf"
  done
  echo "PartitionName=all Nodes=n[0-$((nodes - 1))] Default=YES MaxTime=INFINITE State=UP" >>"$directory/slurm.conf"
}

free_ports() {
  local count="$1" port=$((20000 + (RANDOM * 3) % 10000))
  while ((count > 0)); do
    port=$((port + 1))
    if ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
      echo "$port"
      count=$((count - 1))
    fi
  done
}

start_node() {
  mkdir -p "$1/spool/$2" "$1/tmp/$2"
  slurmd -N "$2" -f "$1/slurm.conf"
}

wait_until_idle() {
  local nodes="$1" attempt
  for ((attempt = 0; attempt < 100; attempt++)); do
    if [ "$(sinfo --noheader --Node --states idle 2>/dev/null | wc -l)" -ge "$nodes" ]; then
      return 0
    fi
    sleep 0.1
  done
  echo "error: the nodes did not become idle; see $(dirname "$SLURM_CONF")/log" >&2
  return 1
}

# In a process of its own, which outlives a killed test and stops what that one can stop no more.
watch() {
  tail --pid="$2" -f /dev/null
  rm -f "$1/watcher"
  stop "$1"
}

# The process numbers of a node: its slurmd, its tasks (known by their environment), and the step daemons above them.
node_processes() {
  local environment process parent
  cat "$1/spool/$2.pid"
  for environment in $(grep -slzx "SLURMD_NODENAME=$2" /proc/[0-9]*/environ | xargs --no-run-if-empty grep -slzx "SLURM_CONF=$1/slurm.conf"); do
    process="${environment//[^0-9]/}"
    parent="$(cut -d ' ' -f 4 "/proc/$process/stat" 2>/dev/null || true)"
    echo "$process"
    if grep -qs slurmstepd "/proc/$parent/comm"; then
      echo "$parent"
    fi
  done
}

kill_node() {
  local -a victims
  mapfile -t victims < <(node_processes "$1" "$2")
  kill -KILL "${victims[@]}" 2>/dev/null || true
}

stop() {
  local directory="$1" pid_file
  if [ -e "$directory/watcher" ]; then
    kill -- "-$(cat "$directory/watcher")" 2>/dev/null || true # with the tail that it waits for
    rm -f "$directory/watcher"
  fi
  scancel --user "$(id -un)" 2>/dev/null || true
  for pid_file in "$directory"/spool/*.pid; do
    if [ -e "$pid_file" ]; then
      kill_node "$directory" "$(basename "$pid_file" .pid)"
    fi
  done
  for pid_file in "$directory/state/slurmctld.pid" "$directory/munge/pid"; do
    if [ -e "$pid_file" ]; then
      kill "$(cat "$pid_file")" 2>/dev/null || true
    fi
  done
}

main "$@"
