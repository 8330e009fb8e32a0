#!/bin/bash
# A job for SLURM, on one node or on several that see the same disk. Before its time is up, or when it is preempted, the
# run saves a checkpoint; the job is queued again and goes on from there.
#     OUTPUT_DIR=/shared/run sbatch --nodes 2 recipes/launch/slurm.sh recipes/whisper_full/run.py [ARGUMENTS ...]
# CONFIG=recipes/launch/fsdp2.yaml before it chooses another launch configuration.
#SBATCH --job-name=hfspeech
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300

set -u
: "${OUTPUT_DIR:?Say where the run may write: OUTPUT_DIR=/shared/run sbatch ...}"
mkdir -p "$OUTPUT_DIR"
launched=$OUTPUT_DIR/.launched  # what the record says was written in this launch if it is newer
: > "$launched"

# Every process of the run gets SIGTERM, saves its part of a checkpoint and ends.
trap 'scancel --signal=TERM "$SLURM_JOB_ID"' USR1 TERM

nodes=$SLURM_JOB_NUM_NODES
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' - \
    --config_file "${CONFIG:-recipes/launch/several_machines.yaml}" \
    --num_machines "$nodes" --num_processes "$((nodes * SLURM_GPUS_ON_NODE))" \
    --main_process_ip "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)" \
    --main_process_port "$((20000 + SLURM_JOB_ID % 20000))" \
    "$@" --output_dir "$OUTPUT_DIR" &
step=$!
wait "$step"
status=$?
while kill -0 "$step" 2> /dev/null; do  # a signal ends `wait`, not what is waited for
    wait "$step"
    status=$?
done

# `accelerate launch` hides how its processes ended; the record tells.
if [ "$OUTPUT_DIR/run.json" -nt "$launched" ] && grep -q '"state": "interrupted"' "$OUTPUT_DIR/run.json"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
