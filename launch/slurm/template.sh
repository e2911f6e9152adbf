#!/bin/bash
# Written by launch/slurm.py, with its flags:
#     @written_by@
# Change the flags and write it again. More flags of the training: sbatch FILE --learning_rate 1e-4 ... How it works: docs/multinode.md
@sbatch@

set -u
[ -f launch/train.py ] || { echo "submit this job from the checkout: launch/train.py is not in $PWD" >&2; exit 2; }
for flag in "$@"; do
    case $flag in --output_dir* | --resume_from_checkpoint* | --overwrite_output_dir*)
        echo "$flag is this script's to give; write another one with launch/slurm.py" >&2; exit 2 ;;
    esac
done

@environment@
# srun of Slurm 22.05 and later does not take sbatch's --cpus-per-task.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

@run@
train=(
@command@
)

# In every task: what libraries build and keep goes to the host's own disk, so that it is built once per host, under a lock that works
# there; the first rank builds, the others wait. Models stay where they are. A lock an hour old has no builder left.
# The task stays behind, deaf to what Slurm sends to all processes of the step, to say how the training ended: srun gives the highest
# code, and the rank that failed may have 1 where those that lost it, or were killed for it, have 76 and 137. The first to end is the cause.
# shellcheck disable=SC2016  # expands in the task
on_host='
trap : INT TERM USR1 USR2
first=$1
shift
said() { # of all tasks, one makes the file
    [ "$1" = 0 ] || (set -o noclobber && echo "$1" >"$first") 2>/dev/null
    exit "$1"
}
cache=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/adakron-$(id -un)
mkdir -p -m 700 "$cache" && [ -O "$cache" ] || { echo "$cache on $(hostname) is not ours to write; set SLURM_TMPDIR" >&2; said 2; }
home=${HF_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/huggingface}
export HF_HUB_CACHE=${HF_HUB_CACHE:-${HUGGINGFACE_HUB_CACHE:-$home/hub}} HF_TOKEN_PATH=${HF_TOKEN_PATH:-$home/token} HF_HOME=$cache/huggingface
export TORCH_EXTENSIONS_DIR=$cache/torch_extensions TRITON_CACHE_DIR=$cache/triton
find "$TORCH_EXTENSIONS_DIR" -name lock -mmin +60 -delete 2>/dev/null
binds=${APPTAINER_BIND:-${SINGULARITY_BIND:-}} # a container does not see every folder of its host
export APPTAINER_BIND=${binds:+$binds,}$cache
"$@"
said $?'

# One job of an array carries the number of the whole array; by this name it is meant alone.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
newest() { cat "$run_dir/latest" 2>/dev/null || true; }
before=$(newest)
# The run itself removes the mark of an earlier stop, once the folder is its own; until then it may be another job's.
mark() { stat -c '%i %y' "$run_dir/stopped.json" 2>/dev/null || true; }
old_mark=$(mark)
restarts=${SLURM_RESTART_COUNT:-0}
echo "start $((restarts + 1)) of job $job on $SLURM_JOB_NODELIST, $run_dir: ${before:-no checkpoint yet}"
first=$PWD/.slurm-$job-$((restarts + 1)).first # in the folder of the log, which all hosts see, too
rm -f "$first"

# The warning of --signal comes to this shell alone, and only while it waits: so srun runs beside it, and passes it to all ranks.
step='' signalled='' ended=''
trap 'signalled=1; [ -z "$step" ] || kill -USR1 "$step"' USR1
trap 'signalled=1; ended=1' TERM # Slurm ends the job: cancelled, preempted, or out of time. It sends the ranks their own.
srun --kill-on-bad-exit=1 bash -c "$on_host" on_host "$first" "${train[@]}" &
step=$!
while :; do
    signalled=''
    wait "$step"
    code=$?
    [ -n "$signalled" ] || break # a trap ends wait early
done

# srun's code is no proof: the first rank to leave gets the others killed, and 143 may stand for a run that has saved.
new_mark=$(mark)
cause=$(cat "$first" 2>/dev/null || true)
rm -f "$first"
if [ -n "$new_mark" ] && [ "$new_mark" != "$old_mark" ]; then
    code=75
elif [ "$cause" = 1 ] || [ "$cause" = 2 ]; then
    code=$cause # it would fail again
fi
# A rank may be lost before the first checkpoint; twice in a row is no chance.
again=$PWD/.slurm-$job.again
if [ "$code" = 0 ] || [ "$(newest)" != "$before" ]; then rm -f "$again"; fi
case $code in
    75 | 76 | 137) ;; # stopped; a rank was lost, or killed: it goes on from the newest checkpoint
    0) exit 0 ;;
    *)
        echo "ended with $code: the rank that failed first says why, above and in $run_dir/logs" >&2
        exit "$code" ;;
esac
# A controller that does not answer says nothing: then it decides when it is asked to queue the job again.
for pause in 5 15 0; do
    state=$(squeue --noheader --jobs "$job" --format %T) && [ -n "$state" ] && break
    sleep "$pause"
done
if [ -n "$ended" ] || [ "${state:-RUNNING}" != RUNNING ]; then
    reason="Slurm ends the job"
elif [ "$(newest)" = "$before" ] && { [ "$code" = 75 ] || [ -e "$again" ]; }; then
    reason="this start made no new checkpoint: ${before:-there is none}"
elif [ "$restarts" -ge @max_restarts@ ]; then
    reason="it was queued again $restarts times"
elif { [ "$(newest)" != "$before" ] || touch "$again"; } && scontrol requeue "$job"; then
    echo "queued again with $(newest)"
    sleep 600 # Slurm ends this script
    [ -z "$ended" ] || exit "$code"
    reason="Slurm did not end this start"
else
    reason="scontrol refused"
fi
rm -f "$again"
echo "not queued again: $reason. To go on: sbatch the same script${*:+ $*}" >&2
exit "$code"
