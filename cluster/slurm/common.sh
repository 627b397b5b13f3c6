# Shared by the sbatch scripts, which source it.
# shellcheck shell=bash

SIVAE_SLURM_DIR=${SIVAE_SLURM_DIR:-$here}
python=${SIVAE_PYTHON:-python}
# worker.sh leaves this when a run was stopped with a checkpoint saved: torchrun itself always ends with 1.
SIVAE_STOPPED=$SLURM_SUBMIT_DIR/.sivae-stopped-$SLURM_JOB_ID
export SIVAE_SLURM_DIR SIVAE_STOPPED
export SIVAE_PYTHON=$python PYTHONPATH=$SLURM_SUBMIT_DIR${PYTHONPATH:+:$PYTHONPATH}
# Since Slurm 22.05 srun does not take this over from sbatch: every step would have one core.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
rm -f "$SIVAE_STOPPED"

# address_of NODE: its address on the cluster's network, as the node itself sees it.
address_of() {
    if [[ -n ${SIVAE_HEAD_IP:-} ]]; then
        echo "$SIVAE_HEAD_IP"
        return
    fi
    srun --nodes=1 --ntasks=1 --nodelist="$1" --overlap hostname -I | awk '{print $1}'
}

# signal_steps SIGNAL: to everything that srun started, under whatever number.
signal_steps() {
    local step
    for step in $(squeue --steps --noheader --job="$SLURM_JOB_ID" --format=%i); do
        if [[ $step =~ \.[0-9]+$ ]]; then scancel --signal="$1" "$step"; fi
    done
}

# ended_by: `user` when the job is being cancelled, `slurm` when it is being requeued already. Nothing while it runs, at its time
# limit, and when the time that a pre-emption granted is over. (Slurm says COMPLETING in all these but the first.)
ended_by() {
    local job
    job=$(scontrol show job "$SLURM_JOB_ID") || return 0
    if [[ $job != *JobState=COMPLETING* ]]; then return; fi
    if [[ $job =~ Restarts=([0-9]+) ]] && ((BASH_REMATCH[1] > ${SLURM_RESTART_COUNT:-0})); then
        echo slurm
    elif [[ $job != *Reason=TimeLimit* && ! $job =~ PreemptTime=[0-9] ]]; then
        echo user
    fi
}

# requeue WHAT CODE: after WHAT, put the job back into the queue; or end with CODE, where it was cancelled or has been back enough.
requeue() {
    local what=$1 code=$2
    case $(ended_by) in
    user)
        echo "sivae: $what; the job was cancelled, it does not go back into the queue"
        exit "$code"
        ;;
    slurm)
        echo "sivae: $what; Slurm has put the job back into the queue"
        exit "$code"
        ;;
    esac
    if ((${SLURM_RESTART_COUNT:-0} >= ${SIVAE_MAX_REQUEUES:-100})); then
        echo "sivae: $what; not requeued again after ${SLURM_RESTART_COUNT:-0} times (SIVAE_MAX_REQUEUES)" >&2
        exit "$code"
    fi
    echo "sivae: $what; back into the queue"
    # Slurm ends this script by SIGTERM then; to a script that does not heed it, after KillWait.
    trap 'exit 75' TERM
    if ! (trap '' TERM && scontrol requeue "$SLURM_JOB_ID"); then
        echo "sivae: Slurm refused, the job does not go back into the queue; the same sbatch command goes on from the last checkpoint" >&2
        exit "$code"
    fi
    sleep 60 &
    wait $!
    exit 75
}

# wait_and_requeue PID COMMAND [EXPLAIN]: wait for the run; on the signal let COMMAND ask it to save; then requeue, or end with its
# code. After an error EXPLAIN is run first.
wait_and_requeue() {
    local pid=$1 command=$2 explain=${3:-} code=0 asked=0
    # shellcheck disable=SC2064 # the command is the one of now
    trap "asked=1; echo 'sivae: signalled, saving a checkpoint'; $command || true" USR1 TERM
    # A trapped signal ends `wait`, not the run.
    while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done
    trap '' USR1 TERM
    # And when the run ended meanwhile, `wait` has told of the signal: once more, for the run's own code.
    wait "$pid" || code=$?
    if ((code != 0 && code != 75 && !asked)); then eval "$explain" || true; fi
    # Ray would take its time to end, and Slurm half a minute of patience (KillWait).
    signal_steps KILL || true
    if ((code == 75)) || [[ -e $SIVAE_STOPPED ]]; then
        rm -f "$SIVAE_STOPPED"
        requeue "stopped with a checkpoint saved" 75
    fi
    if ((code != 0 && asked)); then requeue "ended with code $code before a checkpoint could be saved" "$code"; fi
    exit "$code"
}

# While addresses are looked up and Ray begins; wait_and_requeue has its own.
trap 'requeue "signalled before the run had started" 75' USR1 TERM
