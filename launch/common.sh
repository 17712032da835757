# Functions that the launch scripts share; sourced, not run. Works with bash 3.2 (macOS) too.
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

# Fills ARGS with its arguments except --dry-run, which may stand anywhere.
read_arguments() {
  local argument
  ARGS=()
  for argument in "$@"; do
    if [ "$argument" = --dry-run ]; then DRY_RUN=true; else ARGS+=("$argument"); fi
  done
}

# Fills WORDS with a training command: its arguments, or `pretrain` and its arguments if the first is an option.
training_words() {
  case ${1:-} in
    '' | -*) WORDS=(pretrain "$@") ;;
    *) WORDS=("$@") ;;
  esac
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

# final CODE: whether a training process with this exit code would end in the same way again: done, a mistake of the user, bad
# data, a loss that is not finite. After any other (killed, preempted, a lost host) it starts again.
final() { case $1 in 0 | 2 | 3 | 4) true ;; *) false ;; esac; }

# Added to final exit codes by Slurm's tasks: srun reports the highest one, and tasks that it kills then have 128 + signal.
FINAL_MARK=200

# A process that dies within QUICK_SECONDS was not interrupted at work; QUICK_LIMIT times in a row, it is broken.
QUICK_SECONDS=600
QUICK_LIMIT=3

# The comment at the head of a script, for --help.
usage() { sed -n '2,/^[^#]/{s/^# \{0,1\}//p;}' "$1"; }
