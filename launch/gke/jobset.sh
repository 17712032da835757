#!/usr/bin/env bash
# TPU slices or GPU nodes of a Kubernetes cluster with JobSet (GKE and others): type this with kubectl connected to the cluster.
#
#   export JOB_NAME=mrmae JOB_IMAGE=REGION-docker.pkg.dev/PROJECT/mrmae/tpu JOB_TPU=tpu-v6e-slice JOB_TOPOLOGY=4x8
#   docker build -f launch/docker/Dockerfile.tpu -t "$JOB_IMAGE" . && docker push "$JOB_IMAGE"
#   bash launch/gke/jobset.sh run --config=mrmae:base --workdir=gs://BUCKET/run --config.data.data_dir=gs://BUCKET/in
#
# For GPUs, JOB_GPU=nvidia-h100-80gb JOB_HOSTS=2 instead of JOB_TPU and JOB_TOPOLOGY, with Dockerfile.gpu. JOB_CHIPS: chips of a
# TPU host (4) or GPUs of a node (8). Also: logs, status, delete; the same run after delete continues. Kubernetes starts the run
# again after preemptions and crashes, not after the exit codes 2, 3 and 4. Another command is the first word after run:
# run finetune --config=...; without one it is pretrain. --dry-run prints manifest and commands.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/../common.sh"

# The manifest of this run: the template with the variables in place; the words of the command as JSON, which is YAML too.
manifest() {
  local template=$here/tpu.yaml
  training_words "$@" --multihost
  if [ -n "${JOB_GPU:-}" ]; then template=$here/gpu.yaml; fi
  # shellcheck disable=SC2016  # the dollars are those of the template
  python3 -c '
import json, math, string, sys
template, name, image, kind, topology, chips, hosts, *words = sys.argv[1:]
hosts = hosts or str(math.prod(map(int, topology.split("x"))) // int(chips))
words = [word.replace("$(", "$$(") for word in words]  # Kubernetes would look for a variable
print(string.Template(open(template).read()).substitute(
    NAME=name, IMAGE=image, KIND=kind, TOPOLOGY=topology, CHIPS=chips, HOSTS=hosts, WORDS=json.dumps(words)), end="")
' "$template" "$JOB_NAME" "$JOB_IMAGE" "${JOB_GPU:-${JOB_TPU:-}}" "${JOB_TOPOLOGY:-}" "${JOB_CHIPS:-$chips}" "${JOB_HOSTS:-}" \
    "${WORDS[@]}"
}

need() {
  local variable
  for variable in "$@"; do [ -n "${!variable:-}" ] || die "$variable is not set; see jobset.sh --help"; done
}

run() {
  local file
  need_bucket "what a container writes goes with it" "$@"
  need JOB_NAME JOB_IMAGE
  if [ -n "${JOB_GPU:-}" ]; then need JOB_HOSTS; chips=8; else need JOB_TPU JOB_TOPOLOGY; chips=4; fi
  if $DRY_RUN; then manifest "$@"; act kubectl apply --filename=-; return; fi
  file=$(manifest "$@")
  printf '%s\n' "$file" | act kubectl apply --filename=-
}

read_arguments "$@"
pods="jobset.sigs.k8s.io/jobset-name=${JOB_NAME:-}"
set -- ${ARGS[@]+"${ARGS[@]}"}
case ${1:-} in
  run) "$@" ;;
  logs) need JOB_NAME; act kubectl logs --selector="$pods,batch.kubernetes.io/job-completion-index=0" --tail=200 --follow ;;
  status) need JOB_NAME; act kubectl get "jobset/$JOB_NAME"; act kubectl get pods --selector="$pods" ;;
  delete) need JOB_NAME; act kubectl delete "jobset/$JOB_NAME" --ignore-not-found ;;
  '' | -h | --help) usage "${BASH_SOURCE[0]}" ;;
  *) die "$1 is not one of run, logs, status, delete" ;;
esac
