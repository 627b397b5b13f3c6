# Shared by the sbatch scripts, which source it.
# shellcheck shell=bash

SIVAE_SLURM_DIR=${SIVAE_SLURM_DIR:-$here}
python=${SIVAE_PYTHON:-python}
# worker.sh leaves this when a run was stopped with a checkpoint saved: torchrun itself always ends with 1.
SIVAE_STOPPED=$SLURM_SUBMIT_DIR/.sivae-stopped-$SLURM_JOB_ID
export SIVAE_SLURM_DIR SIVAE_STOPPED
export SIVAE_PYTHON=$python PYTHONPATH=$SLURM_SUBMIT_DIR${PYTHONPATH:+:$PYTHONPATH}
rm -f "$SIVAE_STOPPED"

# address_of NODE: its address on the cluster's network, as the node itself sees it.
address_of() {
    if [[ -n ${SIVAE_HEAD_IP:-} ]]; then
        echo "$SIVAE_HEAD_IP"
        return
    fi
    srun --nodes=1 --ntasks=1 --nodelist="$1" --overlap hostname -I | awk '{print $1}'
}

# requeue: put the job back into the queue. Slurm ends this script by SIGTERM then; to a script that does not heed it, after KillWait.
requeue() {
    trap 'exit 75' TERM
    (trap '' TERM && scontrol requeue "$SLURM_JOB_ID")
    sleep 60 &
    wait $!
    exit 75
}

# signal_steps SIGNAL: to everything that srun started, under whatever number.
signal_steps() {
    local step
    for step in $(squeue --steps --noheader --job="$SLURM_JOB_ID" --format=%i); do
        if [[ $step =~ \.[0-9]+$ ]]; then scancel --signal="$1" "$step"; fi
    done
}

# wait_and_requeue PID COMMAND: wait for the run; on the signal let COMMAND ask it to save; then requeue, or end with its code.
wait_and_requeue() {
    local pid=$1 command=$2 code=0 asked=0
    # shellcheck disable=SC2064 # the command is the one of now
    trap "asked=1; echo 'sivae: signalled, saving a checkpoint'; $command || true" USR1 TERM
    while :; do
        code=0
        wait "$pid" || code=$?
        # A trapped signal ends `wait`, not the run.
        kill -0 "$pid" 2>/dev/null || break
    done
    trap '' USR1 TERM
    # Ray would take its time to end, and Slurm half a minute of patience (KillWait).
    signal_steps KILL || true
    if ((code == 75)) || [[ -e $SIVAE_STOPPED ]]; then
        rm -f "$SIVAE_STOPPED"
        if ((${SLURM_RESTART_COUNT:-0} >= ${SIVAE_MAX_REQUEUES:-100})); then
            echo "sivae: stopped with a checkpoint saved; not requeued again after ${SLURM_RESTART_COUNT:-0} times (SIVAE_MAX_REQUEUES)" >&2
            exit 75
        fi
        echo "sivae: stopped with a checkpoint saved; back into the queue"
        requeue
    fi
    if ((code != 0 && asked)); then
        echo "sivae: ended with code $code before a checkpoint could be saved; back into the queue, on from the last one" >&2
        requeue
    fi
    exit "$code"
}
