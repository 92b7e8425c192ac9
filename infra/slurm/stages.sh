#!/usr/bin/env bash
# The stages apart, each on the nodes that it needs: collecting on GPUs, then statistics on CPUs.
#
#   infra/slurm/stages.sh recipe.yaml /shared/runs/emotions
#   GPU_OPTIONS='--partition=gpu --nodes=2 --gpus-per-node=4' CPU_OPTIONS='--partition=cpu --cpus-per-task=32' \
#     infra/slurm/stages.sh recipe.yaml s3://BUCKET/RUN
#
# The second job waits until the first has ended well. Prints their ids. What is left is small, and runs on any machine
# that sees the store: python -m jobs.ranges STORE, then python -m jobs.evaluate STORE.
set -euo pipefail

recipe=${1:?give a recipe and a store} store=${2:?give a store}
run=$(dirname "${BASH_SOURCE[0]}")/run.sbatch
read -ra gpu_options <<< "${GPU_OPTIONS:---partition=gpu --gpus-per-node=1}"
read -ra cpu_options <<< "${CPU_OPTIONS:-}"

# A job that queues itself again at its time limit has not ended: the next stage goes on waiting.
collect=$(sbatch --parsable --job-name=neuronlens-collect "${gpu_options[@]}" \
  "$run" python -m jobs.collect "$recipe" --store "$store")
statistics=$(sbatch --parsable --job-name=neuronlens-statistics --dependency="afterok:$collect" \
  --kill-on-invalid-dep=yes "${cpu_options[@]}" "$run" python -m jobs.statistics "$store")
echo "$collect $statistics"
