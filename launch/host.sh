#!/usr/bin/env bash
# One machine: its Python environment, and one training process that outlives the terminal and starts again when it dies.
#
#   bash launch/host.sh setup EXTRAS                            # once: cuda13, or tpu,gcs
#   bash launch/host.sh run --config=mrmae:base --workdir=DIR   # starts it, or finds it running; follows its log
#   bash launch/host.sh stop                                    # it saves and ends; the same run continues it
#
# `run` takes the words of `mrmae`: run finetune --config=..., run probe --config=...; without a command it is pretrain.
# Also: status, logs. --dry-run prints the commands. The exit code of run is that of the training: 0 done, 2 usage, 3 data,
# 4 non-finite; any other is tried again from the newest checkpoint, until it comes three times within ten minutes of starting.
# Everything but the workdir lies in ~/.mrmae_jax. gpu_host.sh and tpu_pod.sh call this script.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/launch/common.sh"
state=$HOME/.mrmae_jax
python=$state/venv/bin/python
STOP_SECONDS=120  # for a last checkpoint

setup() {
  [ $# = 1 ] || die "setup needs the extras to install: cuda13, or tpu,gcs"
  ! running || die "a run is under way here: $(cat "$state/command"); stop it first"
  export PATH="$HOME/.local/bin:$PATH"
  # uv brings its own Python: images of TPU VMs and clusters may have an older one than the 3.11 that is needed.
  command -v uv > /dev/null || act sh -c 'curl -LsSf https://astral.sh/uv/install.sh | sh' || return
  [ -x "$python" ] || act uv venv --python 3.11 "$state/venv" || return
  act uv pip install --python "$python" --constraint "$root/requirements.txt" --editable "${root}[$1]"
}

# The training process and all of its children hold the lock: no process id is trusted, and none is left out.
running() { [ -e "$state/lock" ] && ! flock --nonblock "$state/lock" true; }

run() {
  local command from supervisor
  training_words "$@"
  supervisor=(setsid --fork flock --nonblock "$state/lock" bash "$root/launch/host.sh" supervise "${WORDS[@]}")
  if $DRY_RUN; then act "${supervisor[@]}"; return; fi
  [ -x "$python" ] || die "there is no Python environment in $state/venv: run setup first"
  command=$(printf '%q ' "${WORDS[@]}")
  if running; then
    [ "$(cat "$state/command")" = "$command" ] || die "another run is under way here: $(cat "$state/command"); stop it first"
    from=20
  else
    rm -f "$state/pid" "$state/exit_code"
    touch "$state/train.log"
    printf '%s' "$command" > "$state/command"
    from=+$(($(wc -l < "$state/train.log") + 1))
    "${supervisor[@]}" >> "$state/train.log" 2>&1 < /dev/null
    until [ -e "$state/pid" ]; do sleep 0.1; done
  fi
  tail --lines="$from" --follow=name --pid="$(cat "$state/pid")" "$state/train.log"
  [ -e "$state/exit_code" ] || { say "error: the run was killed; the same command continues it"; return 1; }
  return "$(cat "$state/exit_code")"
}

# Runs detached, started by `run`: trains, again unless the exit code is final, and leaves the exit code.
supervise() {
  local quick=0 began
  cd "$root" || return
  echo $$ > "$state/pid"
  while true; do
    began=$SECONDS
    attend env PYTHONUNBUFFERED=1 "$python" -m mrmae_jax "$@"
    if $stopping || final "$code"; then break; fi
    if [ $((SECONDS - began)) -lt $QUICK_SECONDS ]; then quick=$((quick + 1)); else quick=0; fi
    if [ $quick -ge $QUICK_LIMIT ]; then
      echo "error: exit code $code, $quick times in a row within $((QUICK_SECONDS / 60)) minutes of starting: not trying again"
      break
    fi
    echo "exit code $code: starting again from the newest checkpoint"
    sleep 5
    if $stopping; then break; fi
  done
  echo "$code" > "$state/exit_code"
}

status() {
  if running; then echo "running: $(cat "$state/command")"; else
    [ -e "$state/exit_code" ] || { echo "nothing has run here"; return 1; }
    echo "ended with exit code $(cat "$state/exit_code"): $(cat "$state/command")"
  fi
  tail --lines=1 "$state/train.log"
  running
}

stop() {
  running || { say "nothing runs here"; return; }
  local pid
  pid=$(cat "$state/pid")
  act kill -TERM "$pid"
  $DRY_RUN && return
  flock --timeout $STOP_SECONDS "$state/lock" true && return
  say "it did not end within $STOP_SECONDS s: killed; the newest checkpoint is intact"
  kill -KILL -- "-$pid"
}

if [ "${1:-}" = supervise ]; then  # its arguments are the training's, word by word
  shift
  supervise "$@"
  exit
fi
read_arguments "$@"
set -- ${ARGS[@]+"${ARGS[@]}"}
case ${1:-} in
  setup | run | status | stop) "$@" ;;
  logs) tail --lines=200 "$state/train.log" ;;
  '' | -h | --help) usage "${BASH_SOURCE[0]}" ;;
  *) die "$1 is not one of setup, run, status, logs, stop" ;;
esac
