#!/usr/bin/env bash
#SBATCH --nodes=2 --ntasks-per-node=1 --cpus-per-task=1 --job-name=stops
trap '' USR1
srun --kill-on-bad-exit=1 "$PYTHON" -m slurm.many_stops 20 trainer.num_nodes=2 trainer.devices=1 "$@"
