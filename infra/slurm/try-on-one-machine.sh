#!/usr/bin/env bash
# Slurm on this one machine, to try the scripts beside this one: installs slurmctld, slurmd and munge from Debian's
# packages (as root), starts them with a configuration of its own under /tmp, and stops them at the end.
#
#   infra/slurm/try-on-one-machine.sh          # five to eight minutes, in an environment that has 'neuronlens[cluster]'
#
# It runs the demo's recipe five times: whole, on two nodes (two slurmd on this machine, half of its cores each); told
# to stop half way, so that it queues itself again and goes on; as stages apart; and twice cancelled, when it must not
# come back.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
refuse() {
  echo "try-on-one-machine.sh: $1" >&2
  exit 2
}
[ "$(id -u)" -eq 0 ] || refuse "run it as root: it installs packages and starts slurmd"
for command in neuronlens ray; do
  command -v "$command" > /dev/null || refuse "$command is not on the PATH; activate an environment that has it"
done
if ! { command -v slurmctld && command -v slurmd && command -v munged && command -v sbatch; } > /dev/null; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge
fi
package=$(cd / && python -c 'import neuronlens; print(neuronlens.__path__[0])')
recipe=$package/demo/recipe.yaml

work=$(mktemp -d /tmp/neuronlens-slurm-XXXXXX)
chmod 711 "$work"
export SLURM_CONF=$work/slurm.conf
daemons=()
finish() {
  scancel --user=root 2> /dev/null || true
  [ ${#daemons[@]} -eq 0 ] || kill "${daemons[@]}" 2> /dev/null || true
  wait
  echo "logs and stores are in $work"
}
trap finish EXIT

mkdir "$work/munge" "$work/state" "$work/spool-try1" "$work/spool-try2" "$work/runs"
chmod 711 "$work/munge"
head -c 128 /dev/urandom > "$work/munge/key"
chmod 400 "$work/munge/key"
memory_mb=$(awk '/^MemTotal/ {print int($2 / 1024 * 0.4)}' /proc/meminfo)
n_cpus=$((($(nproc) + 1) / 2))
cat > "$SLURM_CONF" << CONF
ClusterName=try
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
SlurmctldPort=16817
CommunicationParameters=NoInAddrAny
AuthType=auth/munge
AuthInfo=socket=$work/munge/socket
CryptoType=crypto/munge
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool-%n
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=30
SlurmdParameters=config_overrides
NodeName=try[1-2] NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=[16818-16819] CPUs=$n_cpus RealMemory=$memory_mb
PartitionName=gpu Nodes=ALL State=UP
PartitionName=cpu Nodes=ALL State=UP Default=YES
CONF

munged --foreground --force --key-file="$work/munge/key" --socket="$work/munge/socket" --pid-file="$work/munge/pid" \
  --seed-file="$work/munge/seed" --log-file="$work/munge/log" > "$work/munge/out" 2>&1 &
daemons+=($!)
until [ -S "$work/munge/socket" ]; do sleep 0.2; done
slurmctld -D -f "$SLURM_CONF" > "$work/slurmctld.log" 2>&1 &
daemons+=($!)
for name in try1 try2; do
  slurmd -D -N "$name" -f "$SLURM_CONF" > "$work/slurmd-$name.log" 2>&1 &
  daemons+=($!)
done
for _ in $(seq 60); do
  [ "$(sinfo --noheader --format=%T --partition=cpu 2> /dev/null)" != idle ] || break
  sleep 1
done
sinfo

options=(--cpus-per-task="$n_cpus" --chdir="$work" --time=30)
log() { echo "$work/neuronlens-$1.log"; }
await() { # a job's end, and its exit code
  while squeue --noheader --jobs="$1" 2> /dev/null | grep -q .; do sleep 2; done
  scontrol show job "$1" | grep -oE 'JobState=\S+|ExitCode=\S+|Restarts=\S+' | tr '\n' ' '
  echo
}
until_log_says() {
  for _ in $(seq 600); do
    ! grep -qE "$2" "$(log "$1")" 2> /dev/null || return 0
    sleep 0.5
  done
  echo "try-on-one-machine.sh: job $1 never said '$2'" >&2
  return 1
}

echo '== 1. a whole run on two nodes'
job=$(RECIPE=$recipe STORE=$work/runs/whole sbatch --parsable "${options[@]}" --nodes=2 "$here/run.sbatch")
await "$job"
tail -n 20 "$(log "$job")"

echo '== 2. told to stop half way, it queues itself again and goes on'
job=$(RECIPE=$recipe STORE=$work/runs/stopped sbatch --parsable "${options[@]}" "$here/run.sbatch")
until_log_says "$job" '^collect: [1-9]'
scancel --batch --signal=USR1 "$job"
until_log_says "$job" 'ended with exit code'
# Slurm lets a job that was queued again wait for two minutes. Here that would only take time.
sleep 5
scontrol update jobid="$job" starttime=now 2> /dev/null || true
await "$job"
cat "$(log "$job")"

echo '== 3. the stages apart'
cd "$work"
export GPU_OPTIONS="--partition=gpu ${options[*]}" CPU_OPTIONS="--partition=cpu ${options[*]}"
read -r collect statistics <<< "$("$here/stages.sh" "$recipe" "$work/runs/stages")"
await "$collect"
await "$statistics"
tail -n 8 "$(log "$collect")" "$(log "$statistics")"

echo '== 4. cancelled in order and at once, it does not come back'
for how in '--batch --signal=TERM' ''; do
  job=$(RECIPE=$recipe STORE=$work/runs/cancelled${how:+-in-order} sbatch --parsable "${options[@]}" "$here/run.sbatch")
  until_log_says "$job" '^collect: [1-9]'
  # shellcheck disable=SC2086  # two words or none
  scancel $how "$job"
  await "$job"
  tail -n 8 "$(log "$job")"
done

echo '== the same numbers three times'
for store in whole stopped stages; do
  neuronlens sql "$work/runs/$store" "select count(*) rows, sum(n) n, sum(mean * n) total from moments" --format csv
done
