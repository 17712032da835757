#!/usr/bin/env bash
# Runs on each GPU or node, started by slurm.sbatch: the training process.
set -u
. launch/common.sh

# JAX gives each task the GPU of its number on the node; a task that has the node for itself must be told to take all.
if [ "$SLURM_NTASKS" = "$SLURM_NNODES" ] && [ "${SLURM_GPUS_ON_NODE:-1}" -gt 1 ]; then
  JAX_LOCAL_DEVICE_IDS=$(seq -s , 0 $((SLURM_GPUS_ON_NODE - 1)))
  export JAX_LOCAL_DEVICE_IDS
fi
training_words "$@" --multihost
attend env PYTHONUNBUFFERED=1 python -m mrmae_jax "${WORDS[@]}"
if [ "$code" != 0 ] && final "$code"; then exit $((code + FINAL_MARK)); fi
exit "$code"
