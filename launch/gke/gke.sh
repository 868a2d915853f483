#!/usr/bin/env bash
# TPU slices of a GKE cluster, by xpk and kubectl. `bash launch/gke/gke.sh --help` explains it.
#
# It also runs in the bash 3.2 of macOS.
set -euo pipefail

# For its `fail` and `repository`.
# shellcheck source=launch/quickstart.sh
source "$(dirname "${BASH_SOURCE[0]}")/../quickstart.sh"
# shellcheck source=launch/parts/commands.sh
source "$repository/launch/parts/commands.sh"

usage() {
  cat <<'END'
Trains on TPU slices of a GKE cluster: the commands of xpk, docker and kubectl, in the order in which they are needed.

  bash launch/gke/gke.sh SUBCOMMAND FLAGS [-- OVERRIDES]

  cluster   make a cluster with node pools for the slices (xpk)      --project --zone --cluster --type
  storage   let workloads mount a bucket at /gcs (xpk)               --project --zone --cluster --bucket
  image     build the image and push it (docker)                     --image
  secrets   make a Kubernetes secret of a file (kubectl)             --name --secrets
  run       start a run (xpk workload create)      --project --zone --cluster --type --name --image --bucket --config
  jobset    the same by kubectl apply, without xpk                   --type --name --image --bucket --config
  list      what runs on the cluster (xpk)                           --project --zone --cluster
  logs      the log of the first worker (kubectl)                    --name
  fetch     copy the workdir to this machine                         --name --bucket
  stop      delete a run that `run` started (xpk)                    --project --zone --cluster --name
  delete    delete the cluster, without asking again (xpk)           --project --zone --cluster
A subcommand ignores the flags it does not need, so one line of flags serves every step.

Flags (--flag=VALUE or --flag VALUE):
  --project, --zone   of the cluster
  --cluster    its name
  --type       accelerator type, e.g. v5litepod-16, v5p-16, v6e-16
  --slices     so many slices of it, which train together (default: 1)
  --spot       spot node pools: cheaper, and may be taken away; the run restarts and goes on
  --name       name of the run: lower-case letters, digits and hyphens
  --image      e.g. us-docker.pkg.dev/PROJECT/caprl/caprl:latest
  --extras     extras of caprl_jax in the image (default: tpu,buckets,quickstart)
  --bucket     name of the bucket, without gs://; the workdir is its folder runs/NAME
  --config     config file, as caprl_jax.main takes it
  --secrets    file of lines NAME=VALUE for the run's environment, which only its owner can read (chmod 600)
  --restarts   how often a run that asks for it (exit code 75), or lost a node, is started again (default: 100)
  --dry-run    print every command, quoted for the shell, and run none; needs none of the tools
  --help       this page

`run` hands --secrets to xpk, which writes their values into the workload, where those who may read the cluster's jobs
can see them. `secrets` and `jobset` keep them in a Kubernetes secret. Neither has them on a command line.
END
}

run_xpk() {
  call xpk "$@" --project="$project" --zone="$zone"
}

# caprl_jax.main's arguments as words
main_words() {
  arguments=("--config=$config" "--workdir=/gcs/runs/$name" ${overrides[@]+"${overrides[@]}"})
}

# json_list WORD...: as a list of YAML and JSON
json_list() {
  local word list=""
  for word in "$@"; do
    word="${word//\\/\\\\}"
    word="${word//\"/\\\"}"
    word="${word//\$(/\$\$(}" # Kubernetes reads $(NAME) as a variable
    word="${word//$'\n'/\\n}"
    word="${word//$'\t'/\\t}"
    list+="${list:+, }\"$word\""
  done
  printf '[%s]\n' "$list"
}

# What the labels of a type's nodes are: accelerator, topology, nodes of a slice and chips of a node.
# https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
describe_type() {
  local number="${type##*-}" chips
  chips=$((10#$number))
  case "$type" in
    v5litepod-*) accelerator=tpu-v5-lite-podslice ;;
    v6e-*) accelerator=tpu-v6e-slice ;;
    v5p-*)
      accelerator=tpu-v5p-slice
      chips=$((chips / 2)) # its types count cores
      ;;
    *) fail "--type=$type: jobset knows v5litepod-N, v6e-N and v5p-N; \`run\` leaves the others to xpk" ;;
  esac
  case "$accelerator:$chips" in
    tpu-v5p-slice:4) topology=2x2x1 ;;
    tpu-v5p-slice:8) topology=2x2x2 ;;
    tpu-v5p-slice:16) topology=2x2x4 ;;
    tpu-v5p-slice:32) topology=2x4x4 ;;
    tpu-v5p-slice:64) topology=4x4x4 ;;
    tpu-v5p-slice:*) fail "--type=$type: jobset knows v5p-8, -16, -32, -64 and -128" ;;
    *:1) topology=1x1 ;;
    *:4) topology=2x2 ;;
    *:8) topology=2x4 ;;
    *:16) topology=4x4 ;;
    *:32) topology=4x8 ;;
    *:64) topology=8x8 ;;
    *:128) topology=8x16 ;;
    *:256) topology=16x16 ;;
    *) fail "--type=$type: slices have 1, 4, 8, 16, 32, 64, 128 or 256 chips" ;;
  esac
  chips_of_node=$((chips < 4 ? chips : 4))
  nodes=$((chips / chips_of_node))
}

# jobset.yaml with these values in the place of its own. ENVIRON: a value is taken as it stands.
filled_in() {
  main_words
  describe_type
  NAME="$name" SLICES="$slices" NODES="$nodes" CHIPS="$chips_of_node" ACCELERATOR="$accelerator" TOPOLOGY="$topology" \
    IMAGE="$image" BUCKET="$bucket" RESTARTS="$restarts" ARGUMENTS="$(json_list "${arguments[@]}")" \
    awk '
      function put(value) { print substr($0, 1, index($0, ":")) " " value }
      /^#/ { next }
      /^  name: caprl$/ { put(ENVIRON["NAME"]); next }
      /^ *maxRestarts:/ { put(ENVIRON["RESTARTS"]); next }
      /^ *replicas:/ { put(ENVIRON["SLICES"]); next }
      /^ *(parallelism|completions):/ { put(ENVIRON["NODES"]); next }
      /gke-tpu-accelerator:/ { put(ENVIRON["ACCELERATOR"]); next }
      /gke-tpu-topology:/ { put(ENVIRON["TOPOLOGY"]); next }
      /google.com\/tpu:/ { put(ENVIRON["CHIPS"]); next }
      /^ *image:/ { put(ENVIRON["IMAGE"]); next }
      /^ *args:/ { put(ENVIRON["ARGUMENTS"]); next }
      /^ *name: caprl-secrets$/ { put(ENVIRON["NAME"] "-secrets"); next }
      /^ *bucketName:/ { put(ENVIRON["BUCKET"]); next }
      { print }
    ' "$repository/launch/gke/jobset.yaml"
}

# ---- the steps ----

step_cluster() {
  run_xpk cluster create --cluster="$cluster" --tpu-type="$type" --num-slices="$slices" --enable-workload-identity \
    --enable-gcsfuse-csi-driver ${spot:+--spot}
}

step_storage() {
  run_xpk storage attach caprl-bucket --cluster="$cluster" --type=gcsfuse --bucket="$bucket" --mount-point=/gcs \
    --readonly=false --size=1 --auto-mount=false \
    --mount-options=implicit-dirs,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0
}

step_image() {
  call docker build --file launch/gke/Dockerfile --build-arg "EXTRAS=$extras" --tag "$image" .
  call docker push "$image"
}

step_secrets() {
  check_secrets "$secrets"
  call kubectl create secret generic "$name-secrets" --from-env-file="$secrets"
}

step_run() {
  if [[ -n "$secrets" ]]; then
    check_secrets "$secrets"
  fi
  main_words
  run_xpk workload create --cluster="$cluster" --workload="$name" --tpu-type="$type" --num-slices="$slices" \
    --docker-image="$image" --docker-name=caprl --storage=caprl-bucket --max-restarts="$restarts" --restart-on-exit-codes=75 \
    --termination-grace-period-seconds=300 ${spot:+--spot} ${secrets:+"--env-file=$secrets"} \
    --command="$(quote python -m caprl_jax.main --distributed "${arguments[@]}")"
}

step_jobset() {
  local yaml
  yaml="$(filled_in)"
  if [[ -n "$dry_run" ]]; then
    printf "kubectl apply --filename=- <<'END_OF_JOBSET'\n%s\nEND_OF_JOBSET\n" "$yaml"
  else
    printf '%s\n' "$yaml" | kubectl apply --filename=-
  fi
}

# ---- the command line ----

# need FLAG...
need() {
  local flag value
  for flag in "$@"; do
    value="${flag#--}"
    if [[ -z "${!value}" ]]; then
      fail "$flag is missing: $subcommand needs it (--help lists the flags)"
    fi
  done
}

steps="cluster, storage, image, secrets, run, jobset, list, logs, fetch, stop, delete"
subcommand="" project="" zone="" cluster="" type="" name="" image="" bucket="" config="" secrets="" spot=""
slices=1 restarts=100 extras="tpu,buckets,quickstart"
overrides=() arguments=()

while (($# > 0)); do
  case "$1" in
    --)
      shift
      overrides=("$@")
      break
      ;;
    -h | --help)
      usage
      exit 0
      ;;
    --spot) spot=yes ;;
    --dry-run) dry_run=yes ;;
    --project | --zone | --cluster | --type | --slices | --name | --image | --extras | --bucket | --config | \
      --secrets | --restarts)
      if (($# < 2)) || [[ "$2" == --* ]]; then
        fail "$1 needs a value: $1=VALUE (--help lists the flags)"
      fi
      printf -v "${1#--}" '%s' "$2"
      shift
      ;;
    --project=* | --zone=* | --cluster=* | --type=* | --slices=* | --name=* | --image=* | --extras=* | --bucket=* | \
      --config=* | --secrets=* | --restarts=*)
      flag="${1%%=*}"
      printf -v "${flag#--}" '%s' "${1#*=}"
      ;;
    *) take_subcommand "$1" ;;
  esac
  shift
done

case "$subcommand" in
  "") fail "a subcommand is missing; it is one of $steps (--help explains them)" ;;
  cluster) need --project --zone --cluster --type ;;
  storage) need --project --zone --cluster --bucket ;;
  image) need --image ;;
  secrets) need --name --secrets ;;
  run) need --project --zone --cluster --type --name --image --bucket --config ;;
  jobset) need --type --name --image --bucket --config ;;
  list | delete) need --project --zone --cluster ;;
  logs) need --name ;;
  fetch) need --name --bucket ;;
  stop) need --project --zone --cluster --name ;;
  *) fail "unknown subcommand $subcommand; it is one of $steps (--help explains them)" ;;
esac
# 40 letters: xpk's limit; a pod's name has more behind it
if [[ -n "$name" && ! "$name" =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]]; then
  fail "--name=$name: up to 40 lower-case letters, digits and hyphens, and a letter first"
fi
if [[ "$bucket" == */* ]]; then
  fail "--bucket=$bucket: write the bucket's name alone, without gs:// and folders; the workdir is its folder runs/NAME"
fi
for number in "$slices" "$restarts"; do
  if [[ ! "$number" =~ ^[0-9]+$ ]]; then
    fail "--slices and --restarts are whole numbers, not $number"
  fi
done

call cd "$repository"
cd "$repository" # in a dry run too: files of secrets are looked at
case "$subcommand" in
  cluster) step_cluster ;;
  storage) step_storage ;;
  image) step_image ;;
  secrets) step_secrets ;;
  run) step_run ;;
  jobset) step_jobset ;;
  list) run_xpk workload list --cluster="$cluster" ;;
  logs) call kubectl logs --follow --selector="jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0" \
    --container=caprl --tail=200 ;;
  fetch)
    call mkdir -p runs
    call gcloud storage cp --recursive "gs://$bucket/runs/$name" runs/
    ;;
  stop) run_xpk workload delete --cluster="$cluster" --workload="$name" --force ;;
  delete) run_xpk cluster delete --cluster="$cluster" --force ;;
esac
