#!/bin/bash
# Train on Slurm, stop two minutes before the time limit, and requeue until the run has ended:
#
#     sbatch docs/slurm.sh --replicas 4 --control "realistic photo" --neg "CG render" --out runs/mine
#
# All flags go to train.py. --resume starts a new run, or goes on from its newest checkpoint.
# torchrun kills its processes --shutdown-timeout seconds after it has asked them to stop; its own default is 30.
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=01:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --cpu-bind=none torchrun --shutdown-timeout=110 --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-8}" --rdzv_backend=c10d \
    --rdzv_endpoint="$head:29500" --rdzv_id="$SLURM_JOB_ID" train.py --resume "$@" &
run=$!
trap 'kill -TERM "$run"; wait "$run"; scontrol requeue "$SLURM_JOB_ID"' TERM
wait "$run"
