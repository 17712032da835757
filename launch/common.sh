# What the launch scripts share; sourced, not run. Works with bash 3.2 (macOS) too.
# shellcheck shell=bash disable=SC2034

DRY_RUN=false

say() { printf '%s\n' "$*" >&2; }

die() {
  say "error: $*"
  exit 2
}

# Prints a command in a form that can be typed, and runs it unless --dry-run was given.
act() {
  local line
  line=$(printf '%q ' "$@")
  if $DRY_RUN; then printf '%s\n' "${line% }"; else say "+ ${line% }"; "$@"; fi
}

# Fills ARGS with its arguments, less --dry-run, which may stand anywhere.
read_arguments() {
  local argument
  ARGS=()
  for argument in "$@"; do
    if [ "$argument" = --dry-run ]; then DRY_RUN=true; else ARGS+=("$argument"); fi
  done
}

# need_bucket WHY WORDS...: dies unless the words of a training command put its workdir into a bucket.
need_bucket() {
  local why=$1 workdir='' argument
  shift
  for argument in "$@"; do
    case $argument in --workdir=*) workdir=${argument#--workdir=} ;; esac
  done
  case $workdir in
    gs://*) ;;
    *) die "run needs --workdir=gs://BUCKET/FOLDER, not '$workdir': $why" ;;
  esac
}

# Runs a command and sets `code`. A TERM that comes meanwhile is passed on to it, and `stopping` is true from then on.
stopping=false child='' code=0
attend() {
  trap 'stopping=true; kill -TERM "$child" 2> /dev/null' TERM
  "$@" &
  child=$!
  wait "$child"
  code=$?
  if $stopping; then wait "$child"; code=$?; fi  # the first wait ended with the signal, not with the process
}

# Whether a training process that ended so would end so again: done, mistakes of the user, bad data, a loss that is not finite.
# Everything else (killed, preempted, a lost host) starts again.
final() { case $1 in 0 | 2 | 3 | 4) true ;; *) false ;; esac; }

# Added to final exit codes by Slurm's tasks: srun reports the highest one, and tasks that it kills then have 128 + signal.
FINAL_MARK=200

# A process that dies sooner than this was not interrupted at work; that often in a row, it is broken.
QUICK_SECONDS=600
QUICK_LIMIT=3

# The comment at the head of a script, for --help.
usage() { sed -n '2,/^[^#]/{s/^# \{0,1\}//p;}' "$1"; }
