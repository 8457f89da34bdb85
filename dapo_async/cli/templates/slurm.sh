#!/usr/bin/env bash
# Trains %{config} on %{nodes} nodes of a Slurm cluster. Written by:
#   %{command}
# Submit it from a checkout that all nodes see: sbatch %{file}
# It starts one Ray node per machine, waits until the head answers, and runs dapo-async on the head.
# The run itself waits for the other nodes, and says which of its actors have no room yet.
# A lost node ends neither the job nor the engines of other nodes.
#SBATCH --job-name=%{name}
#SBATCH --nodes=%{nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=%{cpus}
%{gpu_line}#SBATCH --exclusive
#SBATCH --time=%{time}
#SBATCH --output=%{name}-%j.log
#SBATCH --open-mode=append
# Before the time limit: the run saves a checkpoint, and the job is queued again and goes on.
#SBATCH --signal=B:USR1@%{grace_s}
#SBATCH --requeue
#SBATCH --no-kill
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}"
# Site: load modules and activate the environment here, e.g. source .venv/bin/activate

run_dir=${RUN_DIR:-%{run_dir}}
wait_s=${WAIT_S:-600} # for the head, and for all nodes after it
port=${RAY_PORT:-6379}
retries=${RETRIES:-3} # of a failed run that has saved no newer checkpoint
# Only processes with this token may join. srun passes the environment on to every node.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_worker_niceness=0
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Since Slurm 22.05 a step does not have the CPUs of the job unless it asks for them.
step=(srun --overlap --no-kill --cpus-per-task="$SLURM_CPUS_PER_TASK")

driver=""
stopped=""
end_driver() { # the first signal lets the run save a checkpoint
  if [ -n "$driver" ]; then kill -TERM "$driver" 2>/dev/null || true; fi
}
end_ray() {
  jobs -p | xargs -r kill 2>/dev/null || true
  wait || true
}
trap 'stopped=limit; end_driver' USR1
trap 'stopped=user; end_driver' TERM INT
trap end_ray EXIT

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# A machine may have several addresses; set HEAD_IP if the first one is not the one to use.
head_ip=${HEAD_IP:-$("${step[@]}" --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')}

"${step[@]}" --nodes=1 --ntasks=1 --nodelist="$head" \
  ray start --head --node-ip-address="$head_ip" --port="$port" --disable-usage-stats --block &
ray_head=$!
waited_s=0
until (exec 3<>"/dev/tcp/$head_ip/$port") 2>/dev/null; do
  if ! kill -0 "$ray_head" 2>/dev/null; then
    echo "Ray's head on $head ($head_ip:$port) did not start; its lines are above" >&2
    exit 1
  fi
  if [ "$waited_s" -ge "$wait_s" ]; then
    echo "Ray's head on $head ($head_ip:$port) did not answer within $wait_s s" >&2
    exit 1
  fi
  sleep 1
  waited_s=$((waited_s + 1))
done
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
  others=$((SLURM_JOB_NUM_NODES - 1))
  "${step[@]}" --nodes="$others" --ntasks="$others" --ntasks-per-node=1 --exclude="$head" \
    ray start --address="$head_ip:$port" --disable-usage-stats --block &
fi

newest() { # checkpoint of the run
  { find "$run_dir/checkpoints" -maxdepth 1 -name 'step_*[0-9]' 2>/dev/null || true; } | sort | tail -n 1
}
before=$(newest)
dapo-async train %{arguments} --supervise \
  run_dir="$run_dir" train.resume=auto ray.address="$head_ip:$port" ray.wait_for_nodes_s="$wait_s" &
driver=$!
while kill -0 "$driver" 2>/dev/null; do wait "$driver" || true; done # a signal ends `wait` early
code=0
wait "$driver" || code=$?
why=""
if [ "$code" -ne 0 ] && [ "$stopped" = limit ]; then
  why="the time limit is near"
elif [ "$code" -eq 1 ] && [ "$stopped" = "" ]; then # a lost node of the learner, for example
  if [ "$(newest)" != "$before" ] || [ "${SLURM_RESTART_COUNT:-0}" -lt "$retries" ]; then
    why="the run has failed"
  else
    echo "the run has failed after $retries retries without a newer checkpoint (RETRIES)" >&2
  fi
fi
if [ -n "$why" ]; then
  echo "$why: queued again, to go on from the newest checkpoint"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
