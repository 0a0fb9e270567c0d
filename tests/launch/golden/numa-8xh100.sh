#!/bin/bash
#SBATCH --job-name=bitlm-first
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR2@300
#SBATCH --output=/shared/runs/first/launch/job-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --exclusive
# Trains /shared/runs/first. Rendered by `bitlm launch slurm`; `bitlm launch resume` submits it again.
set -u

run=/shared/runs/first
config="$run/launch/config.yaml"
cancelled="$run/launch/cancelled"
host_python=/usr/bin/python3 # runs the supervisor on this node
python=/opt/bitlm/bin/python           # runs the ranks

# Stop requests. Bash runs a trap only between commands, so long commands run in the background
# and are waited for.
attempt='' stopped='' ranks=''
stop() {
  stopped=$1
  if [ -n "$attempt" ]; then printf '%s\n' "$stopped" >"$attempt/stop"; fi

  # hung ranks must not use up the time that is needed to requeue
  if [ -n "$ranks" ]; then (sleep 240 && kill -TERM "$ranks") 2>/dev/null & fi
}
trap 'stop "the time limit or preemption"' USR2
trap 'stop "SIGTERM"' TERM

# Waits for a process to exit, also if signals interrupt the wait, and returns its exit code.
wait_for() {
  local code
  while :; do
    wait "$1"
    code=$?
    kill -0 "$1" 2>/dev/null || return "$code"
  done
}

supervisor() { "$host_python" -m bitlm_dist.launch.supervisor "$@"; }

# Runs a command up to four times, because Slurm's controller may be unavailable for a moment.
retry() {
  local pause
  for pause in 2 10 30; do
    "$@" && return
    sleep "$pause"
  done
  "$@"
}

job_state() { scontrol show job -o "$SLURM_JOB_ID" | grep -o 'JobState=[A-Z_]*'; }

# Submits this script as a new job and prints the job id.
submit_again() {
  retry sbatch --parsable "$@" "$run/launch/job.sh" | tee -a "$run/launch/jobs"
}

# Ends the run: no job follows this one.
over() {
  exit "$1"
}
export NCCL_DEBUG=WARN
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
export OMP_NUM_THREADS=12
export BITLM_NUMA=0,0,0,0,1,1,1,1
export PYTHONUNBUFFERED=1
export SRUN_CPUS_PER_TASK=12 # srun no longer inherits it from the job

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
while :; do
  if [ -e "$cancelled" ]; then over 0; fi
  mapfile -t started < <(retry supervisor start-attempt "$run" "${nodes[@]}")
  if [ "${#started[@]}" -ne 3 ]; then over 2; fi
  attempt=${started[0]}

  # the request may have come before the attempt had a folder
  if [ -n "$stopped" ]; then stop "$stopped"; fi
  export BITLM_ATTEMPT=$attempt MASTER_ADDR=${started[1]} MASTER_PORT=${started[2]}
  answer=go
  code=0

  if [ -z "$stopped" ]; then
    srun --kill-on-bad-exit=0 --wait=0 --nodes=16 --ntasks=16 --ntasks-per-node=1 --time=5 \
      bash -c 'trap "" USR1 USR2; exec "$@"' _ "$python" -m bitlm_dist.launch.preflight "$attempt" >>"$attempt/start.log" 2>&1 &
    wait_for $!
    mapfile -t answers < <(supervisor check-nodes "$attempt")
    answer=${answers[0]:-go}
  fi

  if [ "$answer" = go ] && [ -z "$stopped" ]; then
    srun --kill-on-bad-exit=1 --wait=600 --nodes=16 --ntasks=128 --ntasks-per-node=8 \
      bash -c 'trap "" USR1 USR2; exec "$@"' _ "$python" -m bitlm_dist.launch.rank train "$config" >>"$attempt/start.log" 2>&1 &
    ranks=$!

    # … or before the ranks had a process id
    if [ -n "$stopped" ]; then stop "$stopped"; fi
    wait_for "$ranks"
    code=$?
    ranks=''
  fi

  mapfile -t decision < <(retry supervisor finish-attempt "$attempt" "$code")
  case ${decision[0]:-} in
    end) over 0 ;;
    restart)
      sleep "${decision[3]}" &
      if [ -z "$stopped" ]; then wait $!; fi # a signal interrupts the wait
      if [ -z "$stopped" ]; then continue; fi
      ;;
    requeue | resubmit) ;;
    *) over 1 ;;
  esac

  # This allocation ends here. A cancelled job must not be requeued.
  if [ -e "$cancelled" ]; then over 0; fi
  if [ "$(retry job_state)" = JobState=CANCELLED ]; then over 1; fi
  if [ "${decision[0]}" = resubmit ]; then
    submit_again --exclude="${decision[2]}"
    over 0
  fi
  retry scontrol requeue "$SLURM_JOB_ID" # ends this script
  exit
done
