#!/usr/bin/env bash
# A TPU pod slice of Google Cloud, by queued resources: type this on your own machine, in the repository, with gcloud logged in.
#
#   export TPU_NAME=mrmae TPU_ZONE=us-east5-b TPU_TYPE=v6e-32 TPU_SPOT=1    # without TPU_SPOT: on demand
#   bash launch/tpu_pod.sh run --config=mrmae:base --workdir=gs://BUCKET/run --config.data.data_dir=gs://BUCKET/tfds
#   bash launch/tpu_pod.sh delete                                           # when it is done: until then the slice is paid for
#
# run does what is missing of create (ask for the slice, wait for it) and setup (copy the code, make the environment), starts
# the training on every host and follows it. After a preemption it asks for a new slice and continues from the newest
# checkpoint. Closing the terminal does not end the training, the same command finds it again; but to replace a slice it must be
# there: use tmux. Also: status, logs [HOST], stop (the training), setup (after changes to the code). Each can be repeated.
# Another command is the first word after run: run finetune --config=...; without one it is pretrain.
# --dry-run prints the commands.
# Optional: TPU_PROJECT; TPU_RUNTIME, if the image is not that of the type; TPU_CREATE_FLAGS, further words for
# `gcloud compute tpus queued-resources create`, such as "--network=NAME --service-account=ADDRESS".
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/launch/common.sh"
POLL_SECONDS=30
LOST_CONNECTION=255  # exit code of ssh itself

tpus() { act gcloud compute tpus "$@" --zone="$TPU_ZONE" ${TPU_PROJECT:+--project="$TPU_PROJECT"}; }

# Prints what `gcloud compute tpus ARGUMENTS` says; NONE if there is no such resource. Any other failure ends the script.
ask() {
  local errors
  if $DRY_RUN; then tpus "$@"; return; fi
  errors=$(mktemp)
  if ! tpus "$@" 2> "$errors"; then
    grep -qiE 'NOT_FOUND|not found' "$errors" || { cat "$errors" >&2; exit 1; }
    echo NONE
  fi
  rm "$errors"
}

requested() { ask queued-resources describe "$TPU_NAME" --format='value(state.state)'; }

# The slice in one word: NONE, WAITING, READY, PREEMPTED or FAILED.
state() {
  local request node
  request=$(requested) || exit
  case $request in
    NONE | FAILED) echo "$request" ;;
    SUSPENDING | SUSPENDED) echo PREEMPTED ;;
    ACTIVE)
      node=$(ask tpu-vm describe "$TPU_NAME" --format='value(state)') || exit
      case $node in
        READY) echo READY ;;
        NONE | PREEMPTED | TERMINATED | STOPPED) echo PREEMPTED ;;
        *) echo WAITING ;;
      esac ;;
    *) echo WAITING ;;
  esac
}

runtime() {
  case $TPU_TYPE in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    *) die "TPU_TYPE=$TPU_TYPE is not one of v2-N, v3-N, v4-N, v5litepod-N, v5p-N, v6e-N: set TPU_RUNTIME too" ;;
  esac
}

request() {
  # shellcheck disable=SC2086 # TPU_CREATE_FLAGS is several words
  tpus queued-resources create "$TPU_NAME" --node-id="$TPU_NAME" --accelerator-type="$TPU_TYPE" --runtime-version="$image" \
    ${TPU_SPOT:+--spot} ${TPU_CREATE_FLAGS:-} --async
}

release() { tpus queued-resources delete "$TPU_NAME" --force --quiet; }

# Returns when the slice is ready, whatever is there now.
create() {
  local now
  while true; do
    if $DRY_RUN; then requested; request; return; fi
    now=$(state) || exit
    case $now in
      READY) return ;;
      NONE) request ;;
      PREEMPTED) say "the slice was preempted; asking for another"; release; request ;;
      FAILED) die "the request for $TPU_TYPE in $TPU_ZONE failed (quota, zone, type?): see status, then delete it" ;;
      WAITING) say "waiting for $TPU_TYPE in $TPU_ZONE"; sleep $POLL_SECONDS ;;
    esac
  done
}

# on HOST COMMAND: HOST is a number or all. The remote shell takes the command apart again, so its words are quoted with %q.
on() { tpus tpu-vm ssh "$TPU_NAME" --worker="$1" --command="$2"; }

setup() {
  local folder=/tmp code=0
  $DRY_RUN || folder=$(mktemp -d)
  act tar -C "$root" --exclude=__pycache__ -czf "$folder/mrmae_jax.tar.gz" mrmae_jax configs launch pyproject.toml setup.cfg \
    requirements.txt README.md LICENSE &&
    tpus tpu-vm scp "$folder/mrmae_jax.tar.gz" "$TPU_NAME:" --worker=all &&
    on all "if bash mrmae_jax/launch/host.sh status 2> /dev/null; then echo 'error: a run is under way; stop it'; exit 2; fi
      mkdir -p mrmae_jax && tar -xzf mrmae_jax.tar.gz -C mrmae_jax && bash mrmae_jax/launch/host.sh setup tpu,gcs" || code=$?
  $DRY_RUN || rm -r "$folder"
  return $code
}

run() {
  local code now
  need_bucket "disks of a slice go with it, and its hosts share none" "$@"
  trap 'say "the training goes on: the same command follows it again, stop ends it"; exit 130' INT
  while true; do
    create
    code=0
    { on all 'test -x .mrmae_jax/venv/bin/python && test -e mrmae_jax/launch/host.sh' && ! $DRY_RUN; } || setup || code=$?
    [ $code != 0 ] || on all "bash mrmae_jax/launch/host.sh run $(printf '%q ' "$@" --multihost)" || code=$?
    if $DRY_RUN || final $code; then exit $code; fi
    now=$(state) || exit
    # Hosts that are still there have already tried again; see host.sh.
    [ "$now" != READY ] || [ $code = $LOST_CONNECTION ] || exit $code
    say "lost the hosts (exit code $code, slice $now); continuing"
    sleep $POLL_SECONDS
  done
}

status() {
  tpus queued-resources describe "$TPU_NAME" --format='yaml(state)'
  on all 'bash mrmae_jax/launch/host.sh status || true'
}

delete() {
  local request
  request=$(requested) || exit
  if [ "$request" = NONE ]; then say "there is no $TPU_NAME in $TPU_ZONE"; return; fi
  if $DRY_RUN; then echo "$request"; fi
  release
}

read_arguments "$@"
set -- ${ARGS[@]+"${ARGS[@]}"}
case ${1:-} in
  create | setup | run | logs | status | stop | delete) ;;
  '' | -h | --help) usage "${BASH_SOURCE[0]}"; exit ;;
  *) die "$1 is not one of create, setup, run, logs, status, stop, delete" ;;
esac
for variable in TPU_NAME TPU_ZONE TPU_TYPE; do
  [ -n "${!variable:-}" ] || die "$variable is not set, e.g. export TPU_NAME=mrmae TPU_ZONE=us-east5-b TPU_TYPE=v6e-32"
done
image=${TPU_RUNTIME:-$(runtime)}
$DRY_RUN || command -v gcloud > /dev/null || die "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
case $1 in
  logs) on "${2:-0}" 'bash mrmae_jax/launch/host.sh logs' ;;
  stop) on all 'bash mrmae_jax/launch/host.sh stop' ;;
  *) "$@" ;;
esac
