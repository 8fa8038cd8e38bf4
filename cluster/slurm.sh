#!/usr/bin/env bash
# A Ray cluster for as long as one Slurm job, and one job of ours on it:
#
#   sbatch cluster/slurm.sh jobs.curate small --pool.shards '/shared/pool' --output /shared/runs/first
#
# The first node is head and takes no tasks; the others are workers with all their CPUs and GPUs. Slurm sends SIGTERM
# two minutes before the time limit, or before it pre-empts: a training saves a checkpoint and a curation keeps what it
# committed (exit code 4); then the same job is queued again and goes on.
#SBATCH --job-name=curation
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=1
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

if (( $# == 0 )); then
  echo "usage: sbatch cluster/slurm.sh jobs.NAME RECIPE [flags]" >&2
  exit 2
fi

# Other users share these machines: without a token anybody could run code as us. It lies in a file that only we read;
# in the environment of a command line it could be seen.
umask 077
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="${HOME}/.ray/token-${SLURM_JOB_ID}"
mkdir -p "${HOME}/.ray"
python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH"

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head="${nodes[0]}"
port=$(( 20000 + SLURM_JOB_ID % 10000 )) # two jobs on one machine must not meet
agent=$(( 40000 + SLURM_JOB_ID % 10000 ))
address="$(getent ahostsv4 "$head" | awk 'NR == 1 {print $1}'):${port}"
temp="/tmp/ray-${SLURM_JOB_ID}" # short: a socket's path has at most 107 characters

srun --nodes=1 --ntasks=1 --overlap --nodelist="$head" \
  ray start --head --block --node-ip-address="${address%:*}" --port="$port" --num-cpus=0 --num-gpus=0 \
  --dashboard-host=127.0.0.1 --dashboard-port="$(( port + 10000 ))" --dashboard-agent-listen-port="$agent" \
  --ray-client-server-port="$(( port + 30000 ))" --temp-dir="$temp" --disable-usage-stats &
for _ in $(seq 60); do
  if RAY_ADDRESS="$address" ray status > /dev/null 2>&1; then break; fi
  sleep 2
done
if (( ${#nodes[@]} > 1 )); then
  srun --nodes="$(( ${#nodes[@]} - 1 ))" --ntasks="$(( ${#nodes[@]} - 1 ))" --overlap --exclude="$head" \
    ray start --block --address="$address" --num-cpus="${SLURM_CPUS_ON_NODE:-1}" \
    --dashboard-agent-listen-port="$agent" --disable-usage-stats &
fi

RAY_ADDRESS="$address" CURATION_RUN_ID="slurm-${SLURM_JOB_ID}" python -m "$@" --compute.wait-for-nodes-s 600 --log-json &
driver=$!
trap 'kill -TERM "$driver"' TERM # the shell gets the signal (B:), the run must hear it
code=0
wait "$driver" || code=$?
if (( code > 128 )); then # the trap ended the wait, not the run
  code=0
  wait "$driver" || code=$?
fi
rm -f "$RAY_AUTH_TOKEN_PATH"
if (( code == 4 )); then
  scontrol requeue "$SLURM_JOB_ID" # ends this start of the job, and with it head and workers
fi
exit "$code"
