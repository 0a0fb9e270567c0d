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
host_python=/usr/bin/python3 # asks and decides, on this node
python=/opt/bitlm/bin/python           # of the ranks

# What asks to stop. Bash runs a trap only between commands, so whatever takes long is waited for in the background.
attempt='' stopped='' ranks=''
stop() {
  stopped=$1
  if [ -n "$attempt" ]; then printf '%s\n' "$stopped" >"$attempt/stop"; fi
  if [ -n "$ranks" ]; then (sleep 240 && kill -TERM "$ranks") 2>/dev/null & fi # ranks that hang must not use up the time to requeue
}
trap 'stop "the time limit or preemption"' USR2
trap 'stop "SIGTERM"' TERM
wait_for() {
  local code
  while :; do
    wait "$1"
    code=$?
    kill -0 "$1" 2>/dev/null || return "$code"
  done
}

agent() { "$host_python" -m bitlm_dist.launch.agent "$@"; }
retry() { # the controller may be away for a moment
  local pause
  for pause in 2 10 30; do
    "$@" && return
    sleep "$pause"
  done
  "$@"
}
job_state() { scontrol show job -o "$SLURM_JOB_ID" | grep -o 'JobState=[A-Z_]*'; }
submit_again() { # prints the job's number
  retry sbatch --parsable "$@" "$run/launch/job.sh" | tee -a "$run/launch/jobs"
}

over() { # nothing comes after this job
  exit "$1"
}
export NCCL_DEBUG=WARN
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
export OMP_NUM_THREADS=12
export PYTHONUNBUFFERED=1
export SRUN_CPUS_PER_TASK=12 # srun no longer takes it from the job

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
while :; do
  if [ -e "$cancelled" ]; then over 0; fi
  mapfile -t begun < <(retry agent begin "$run" "${nodes[@]}")
  if [ "${#begun[@]}" -ne 3 ]; then over 2; fi
  attempt=${begun[0]}
  if [ -n "$stopped" ]; then stop "$stopped"; fi
  export BITLM_ATTEMPT=$attempt MASTER_ADDR=${begun[1]} MASTER_PORT=${begun[2]}
  answer=go
  code=0

  if [ -z "$stopped" ]; then
    srun --kill-on-bad-exit=0 --wait=0 --nodes=16 --ntasks=16 --ntasks-per-node=1 --time=5 '--container-image=nvcr.io#nvidia/pytorch:25.08-py3' --container-mounts=/shared/runs/first:/shared/runs/first,/shared/data/web:/shared/data/web \
      bash -c 'trap "" USR1 USR2; exec "$@"' _ "$python" -m bitlm_dist.launch.preflight "$attempt" >>"$attempt/start.log" 2>&1 &
    wait_for $!
    mapfile -t answers < <(agent judge "$attempt")
    answer=${answers[0]:-go}
  fi

  if [ "$answer" = go ] && [ -z "$stopped" ]; then
    srun --kill-on-bad-exit=1 --wait=600 --nodes=16 --ntasks=128 --ntasks-per-node=8 '--container-image=nvcr.io#nvidia/pytorch:25.08-py3' --container-mounts=/shared/runs/first:/shared/runs/first,/shared/data/web:/shared/data/web \
      bash -c 'trap "" USR1 USR2; exec "$@"' _ "$python" -m bitlm_dist.launch.rank train "$config" >>"$attempt/start.log" 2>&1 &
    ranks=$!
    if [ -n "$stopped" ]; then stop "$stopped"; fi
    wait_for "$ranks"
    code=$?
    ranks=''
  fi

  mapfile -t verdict < <(retry agent decide "$attempt" "$code")
  case ${verdict[0]:-} in
    end) over 0 ;;
    restart)
      sleep "${verdict[3]}" &
      if [ -z "$stopped" ]; then wait $!; fi # a signal cuts it short
      if [ -z "$stopped" ]; then continue; fi
      ;;
    requeue | resubmit) ;;
    *) over 1 ;;
  esac
  # this allocation ends here; a job that was cancelled is not brought back
  if [ -e "$cancelled" ]; then over 0; fi
  if [ "$(retry job_state)" = JobState=CANCELLED ]; then over 1; fi
  if [ "${verdict[0]}" = resubmit ]; then
    submit_again --exclude="${verdict[2]}"
    over 0
  fi
  retry scontrol requeue "$SLURM_JOB_ID" # ends this script
  exit
done
