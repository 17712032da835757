#!/usr/bin/env bash
# One machine with NVIDIA GPUs: type this on it, in the repository.
#
#   bash launch/gpu_host.sh setup
#   bash launch/gpu_host.sh run --config=mrmae:base --workdir=DIR --config.data.source=folder:/path/to/imagenet
#   bash launch/gpu_host.sh stop                     # also: status, logs; the same run again continues
#
# Another command is the first word after run: run finetune --config=...; without one it is pretrain.
# The run outlives the terminal and starts again when it dies; see host.sh, which does the work. It takes every GPU that
# CUDA_VISIBLE_DEVICES leaves. --dry-run prints the commands.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/common.sh"
read_arguments "$@"
case ${ARGS[0]:-} in
  '' | -h | --help) usage "${BASH_SOURCE[0]}"; exit ;;
  setup)
    nvidia-smi -L > /dev/null 2>&1 || $DRY_RUN || die "nvidia-smi finds no GPU: install NVIDIA's driver, 580 or newer, first"
    [ ${#ARGS[@]} -gt 1 ] || set -- "$@" cuda13 ;;
esac
exec bash "$here/host.sh" "$@"
