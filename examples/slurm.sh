#!/bin/bash
# A retrofit on several nodes, weights in shards:   sbatch examples/slurm.sh CONFIG.yaml [key=value ...]
# The output folder must be on a file system that all nodes share; a job that was stopped goes on when it is sent again.
#SBATCH --job-name=sparsekv-retrofit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --requeue

set -euo pipefail
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# shellcheck disable=SC2016  # SLURM_NODEID is each node's own
srun bash -c '
    accelerate launch \
        --config_file configs/accelerate/fsdp2.yaml \
        --num_machines "$SLURM_NNODES" \
        --num_processes "$((SLURM_NNODES * SLURM_GPUS_ON_NODE))" \
        --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$0" \
        --main_process_port 29500 \
        -m sparsekv.retrofit "$@"
' "$first" "$@"
