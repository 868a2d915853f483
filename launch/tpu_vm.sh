#!/usr/bin/env bash
# From a laptop with gcloud to a finished run on Cloud TPU slices. `bash launch/tpu_vm.sh --help` explains it.
#
# It also runs in the bash 3.2 of macOS: no ${x@Q}, no mapfile, and empty arrays only as ${a[@]+"${a[@]}"}.
set -euo pipefail

# For its `fail`, `repository` and `judge_package`.
# shellcheck source=launch/quickstart.sh
source "$(dirname "${BASH_SOURCE[0]}")/quickstart.sh"
# shellcheck source=launch/parts/commands.sh
source "$repository/launch/parts/commands.sh"
# shellcheck source=launch/parts/tpu_workers.sh
source "$repository/launch/parts/tpu_workers.sh"
# shellcheck source=launch/parts/tpu_slices.sh
source "$repository/launch/parts/tpu_slices.sh"

usage() {
  cat <<'EOF'
Trains on Cloud TPU: makes a slice, installs caprl_jax on every worker, runs, follows the log, fetches the result.

  bash launch/tpu_vm.sh SUBCOMMAND FLAGS [-- OVERRIDES]

  bash launch/tpu_vm.sh all --name=caprl --zone=us-west4-a --type=v5litepod-8 --quickstart \
    --config=configs/quickstart.py --workdir=runs/tpu -- --config.evaluate.batch_size=16

Subcommands, and the flags each of them needs:
  create    make the slice                                           --name --zone --type
  install   copy this working tree to all workers, install it there  --name --zone
  run       start the run on all workers; it outlives the ssh        --name --zone --config --workdir
  logs      follow the log of worker 0 until the run ends            --name --zone
  status    what the slice is, and what the run on it                --name --zone
  fetch     copy the workdir to this machine                         --workdir; unless it is gs://, --name --zone
  delete    delete the slice, without asking again                   --name --zone
  all       the steps above until the run is complete; `delete` only
            with --delete or --budget                                --name --zone --type --config --workdir
A subcommand ignores the flags it does not need, so one line of flags serves every step.

Flags (--flag=VALUE or --flag VALUE):
  --name       name of the slice: lower-case letters, digits and hyphens
  --zone       e.g. us-west4-a; `gcloud compute tpus accelerator-types list --zone=ZONE` shows what a zone has
  --type       accelerator type, e.g. v5litepod-8, v5p-8, v6e-8
  --slices     so many slices of that type, which train together (multi-slice); implies --queued
  --version    TPU software version; without it, the one for JAX on that type
  --project    Google Cloud project; without it, gcloud's default
  --spot       a spot slice: cheaper, and may be taken away at any time; `all` makes another one, and goes on
  --queued     ask by a queued resource and wait until it is active; give it to all subcommands
  --budget     hours that slices may be active, in all: then the run saves and ends, and the slice is deleted
  --repo       clone this git URL on the workers instead of copying this working tree
  --extras     extras of caprl_jax to install (default: tpu)
  --quickstart install what configs/quickstart.py needs too: the extra `quickstart` and the judge's weights
  --config     config file, as caprl_jax.main takes it
  --workdir    folder of the run: relative to the copy of the repository on the workers, or gs://BUCKET/FOLDER
  --secrets    file of lines NAME=VALUE for the run's environment, which only its owner can read (chmod 600)
  --to         folder on this machine that `fetch` copies the workdir into (default: runs)
  --delete     `all` deletes the slice once the run has ended and its workdir is here
  --dry-run    print every command, quoted for the shell, and run none; needs no gcloud
  --help       this page

A workdir in gs:// outlives the slice. After a preemption, and after exit code 75 ("run me again"), `all` then goes on
from the last checkpoint until the run is complete; the same line after Ctrl-C or a closed laptop does so too. One worker
writes to the bucket itself. Several (v5litepod-16, v5p-16 and larger, or --slices) need a workdir in gs://: they write
one checkpoint together, and the bucket is mounted on them with gcsfuse. The slice's service account must be allowed to
write to the bucket and, for a --budget that holds while this machine is off, to delete the slice.

HF_TOKEN and WANDB_API_KEY, if set, and the lines of --secrets go to the run in a file of mode 600 that is removed once
the run has read it. They are never printed, and stand in no command. Relative paths on this machine are relative to the
repository. CAPRL_JAX_POLL_SECS: how often a state is asked for (default: 60). Exit codes: 2 for bad flags, no quota and
no capacity; 75 where the budget is spent or a slice was lost with its workdir; else that of the run.
EOF
}

# ---- asking gcloud ----

# --quiet: gcloud takes the default answer. A question nobody sees would hold up a slice that is being paid for.
tpu() { # tpu SUBCOMMAND ARGUMENT...
  call gcloud compute tpus tpu-vm "$@" --zone="$zone" ${project:+"--project=$project"} --quiet
}

queued_resource() {
  call gcloud compute tpus queued-resources "$@" --zone="$zone" ${project:+"--project=$project"} --quiet
}

on_worker() { # on_worker WORKER SCRIPT [SSH_FLAG]; WORKER is all or 0
  if ((slices > 1)); then
    queued_resource ssh "$name" --node="$1" --worker="$1" ${3:+"--ssh-flag=$3"} --command="$2"
  else
    tpu ssh "$name" --worker="$1" ${3:+"--ssh-flag=$3"} --command="$2"
  fi
}

copy() { # copy WORKER FLAG_OR_PATH...
  local worker="$1"
  shift
  if ((slices > 1)); then
    queued_resource scp "$@" --node="$worker" --worker="$worker"
  else
    tpu scp "$@" --worker="$worker"
  fi
}

# This script's own line for another subcommand, with the flags that name the slice.
own_line() {
  local multi=""
  if ((slices > 1)); then
    multi="--slices=$slices"
  fi
  quote bash launch/tpu_vm.sh "$1" --name="$name" --zone="$zone" ${project:+"--project=$project"} \
    ${queued:+--queued} ${multi:+"$multi"}
}

remind_of_cost() {
  say "$name costs money until it is deleted: $(own_line delete)"
}

slice_exists="" # as far as this process knows
secrets_here="build/tpu_vm/secrets"
said_file="build/tpu_vm/said" # by gcloud, on stderr

# shellcheck disable=SC2329 # the trap at the end calls it
on_exit() {
  if [[ -z "$dry_run" ]]; then
    rm -f "$secrets_here" "$said_file"
    if [[ -n "$slice_exists" ]]; then
      remind_of_cost
    fi
  fi
}

# ---- what runs here ----

# What git knows or would add, as it lies in the working tree; a file that is deleted but not committed is passed over.
pack_lines() {
  cat <<'EOF'
mkdir -p build/tpu_vm
git ls-files -z --cached --others --exclude-standard -- . ':!build/tpu_vm' | while IFS= read -r -d '' file; do
  if [ -e "$file" ] || [ -L "$file" ]; then printf '%s\0' "$file"; fi
done | COPYFILE_DISABLE=1 tar --null -czf build/tpu_vm/code.tar.gz -T -
EOF
}

# The shell's own printf: a secret is in no list of processes.
secrets_lines() {
  echo "mkdir -p build/tpu_vm"
  echo "(umask 077 && rm -f $secrets_here && {"
  local variable
  for variable in HF_TOKEN WANDB_API_KEY; do
    if [[ -n "${!variable:-}" ]]; then
      printf "  printf '%s=%%s\\\\n' \"\$%s\"\n" "$variable" "$variable"
    fi
  done
  if [[ -n "$secrets" ]]; then
    echo "  cat $(quote "$secrets")"
  fi
  echo "} >$secrets_here)"
}

# ---- the steps; those that make, watch and delete slices are in parts/tpu_slices.sh ----

step_install() {
  local judge="" with="$extras"
  if [[ -n "$quickstart" ]]; then
    with="$with,quickstart"
    judge="$judge_package"
  fi
  if writes_to_the_bucket; then
    with="$with,buckets"
  fi
  say "Installing caprl_jax[$with] on all workers of $name ..."
  on_worker all "mkdir -p -m 700 ~/caprl_jax_run"
  if [[ -n "$repo" ]]; then
    on_worker all "repo=$(quote "$repo")"$'\n'"$(remote_clone)"
  else
    if [[ -z "$dry_run" ]] && ! git rev-parse --git-dir >/dev/null 2>&1; then
      fail "$repository is not a git checkout, so which files to copy is not known; use --repo=URL"
    fi
    call_lines "$(pack_lines)"
    copy all build/tpu_vm/code.tar.gz "$name:caprl_jax_run/"
    on_worker all "$(remote_unpack)"
  fi
  on_worker all "extras=$(quote "$with")"$'\n'"judge=$(quote "$judge")"$'\n'"$(remote_environment)"
}

step_run() {
  local command remote="$workdir" bucket=""
  say "Starting the run on all workers of $name ..."
  if [[ "$workdir" == gs://* ]] && ! writes_to_the_bucket; then
    # shellcheck disable=SC2088 # caprl_jax.main expands the ~, over there
    remote="~/gcs/${workdir#gs://}"
    bucket="${workdir#gs://}"
    bucket="${bucket%%/*}"
    on_worker all "bucket=$(quote "$bucket")"$'\n'"$(remote_mount)"
  fi
  if [[ -n "${HF_TOKEN:-}${WANDB_API_KEY:-}$secrets" ]]; then
    call_lines "$(secrets_lines)"
    copy all "$secrets_here" "$name:caprl_jax_run/"
    call rm -f "$secrets_here"
  fi
  # --distributed is right on one worker too, and TPU VMs do not set the variables that main looks for. It finds the
  # other workers, and those of other slices (MEGASCALE_...), in the slices' metadata.
  command="$(quote .venv/bin/python -m caprl_jax.main --config="$config" --workdir="$remote" --distributed \
    ${overrides[@]+"${overrides[@]}"})"
  on_worker all "set -- $command"$'\n'"$(remote_start)"
  if [[ -n "$budget" ]]; then
    on_worker 0 "secs=$(budget_left)"$'\n'"set -- $(delete_command)"$'\n'"$(remote_deadline)"
  fi
}

step_fetch() {
  say "Copying $workdir to $to/$(basename "$workdir") ..."
  call mkdir -p "$to"
  case "$workdir" in
    gs://*) call gcloud storage cp --recursive "$workdir" "$to/" ;;
    /* | "~"*) copy 0 --recurse "$name:$workdir" "$to/" ;;
    *) copy 0 --recurse "$name:caprl_jax/$workdir" "$to/" ;;
  esac
}

# A failed run is fetched and deleted too; when a step fails, and so when the workdir is not here, nothing is deleted. A
# spent budget is the exception: it deletes.
step_all() {
  local answer=""
  run_until_complete
  try step_fetch
  if [[ -n "$gone" ]]; then
    step_delete
    say "$name was taken away before $workdir was copied: what it wrote is lost. A workdir in gs:// is not."
    exit 75
  elif ((failed != 0)) && [[ "$outcome" != spent ]]; then
    exit "$failed"
  elif ((failed != 0)); then
    say "$workdir could not be copied."
  fi
  if [[ -z "$delete$budget" && -z "$dry_run" && -t 0 && -t 1 ]]; then
    read -r -p "Delete $name now? It costs money until it is deleted. [y/N] " answer || true
  fi
  if [[ -n "$delete$budget" || "$answer" == [yY]* ]]; then
    step_delete
  elif [[ -n "$dry_run" ]]; then
    remind_of_cost
  fi
  if [[ "$outcome" == spent ]]; then
    say "The budget of $budget hours is spent, and $name is deleted. The same line with a larger --budget goes on" \
      "where the workdir is in gs://."
  fi
}

# ---- the command line ----

# need FLAG VALUE EXAMPLE
need() {
  if [[ -z "$2" ]]; then
    fail "$1 is missing: $subcommand needs it, e.g. $1=$3 (--help lists the flags)"
  fi
}

need_slice() {
  need --name "$name" caprl
  need --zone "$zone" us-west4-a
  if [[ ! "$name" =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]]; then
    fail "--name=$name: a slice's name is lower-case letters, digits and hyphens and begins with a letter"
  fi
}

need_type() {
  need --type "$type" v5litepod-8
  if [[ ! "$type" =~ ^[a-z0-9]+-[0-9]+$ ]]; then
    fail "--type=$type is not an accelerator type; they look like v5litepod-8, v5p-8 or v6e-8"
  fi
  if [[ -z "$version" ]]; then
    # https://cloud.google.com/tpu/docs/runtimes
    case "$type" in
      v6e-*) version=v2-alpha-tpuv6e ;;
      v5p-*) version=v2-alpha-tpuv5 ;;
      v5litepod-*) version=v2-alpha-tpuv5-lite ;;
      v2-* | v3-* | v4-*) version=tpu-ubuntu2204-base ;;
      *) fail "--version is missing: the TPU software version for $type is not known here, name one" ;;
    esac
  fi
}

need_workdir() {
  need --workdir "$workdir" runs/tpu
  # The shells, scp and gcloud storage that the path goes through disagree on how to quote anything else.
  local plain='^(gs://|~/|/)?[A-Za-z0-9_.][A-Za-z0-9_./-]*$'
  if [[ ! "$workdir" =~ $plain ]]; then
    fail "--workdir=$workdir: write a folder relative to the repository, an absolute one, or gs://BUCKET/FOLDER," \
      "of letters, digits and . _ - / only"
  fi
}

# All types have one worker up to 8 chips or cores, and several from there.
several_workers() {
  if ((slices > 1)); then
    return 0
  fi
  [[ "$type" =~ -[0-9]+$ ]] && ((10#${type##*-} > 8))
}

# Where one worker alone runs, it keeps the bucket by itself; where that is not known, the bucket is mounted.
writes_to_the_bucket() {
  [[ "$workdir" == gs://* && -n "$type" ]] && ! several_workers
}

need_run() {
  need --config "$config" configs/quickstart.py
  need_workdir
  if [[ "$workdir" != gs://* ]] && several_workers; then
    fail "--workdir=$workdir: $type has several workers, which need one folder that all of them see;" \
      "use --workdir=gs://BUCKET/FOLDER"
  fi
}

steps="create, install, run, logs, status, fetch, delete, all"
subcommand="" name="" zone="" type="" version="" project="" repo="" extras="tpu" config="" workdir="" to="runs"
spot="" queued="" quickstart="" delete="" slices=1 budget="" secrets=""
overrides=()
run_code=0

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
    --queued) queued=yes ;;
    --quickstart) quickstart=yes ;;
    --delete) delete=yes ;;
    --dry-run) dry_run=yes ;;
    --name | --zone | --type | --version | --project | --repo | --extras | --config | --workdir | --to | --slices | \
      --budget | --secrets)
      if (($# < 2)) || [[ "$2" == --* ]]; then
        fail "$1 needs a value: $1=VALUE (--help lists the flags)"
      fi
      printf -v "${1#--}" '%s' "$2"
      shift
      ;;
    --name=* | --zone=* | --type=* | --version=* | --project=* | --repo=* | --extras=* | --config=* | --workdir=* | \
      --to=* | --slices=* | --budget=* | --secrets=*)
      flag="${1%%=*}"
      printf -v "${flag#--}" '%s' "${1#*=}"
      ;;
    *) take_subcommand "$1" ;;
  esac
  shift
done

while [[ "$workdir" == ?*/ ]]; do
  workdir="${workdir%/}"
done
if [[ ! "$slices" =~ ^[1-9][0-9]*$ ]]; then
  fail "--slices=$slices: write how many slices train together, 1 or more"
fi
if ((slices > 1)); then
  queued=yes # only queued resources know several slices
fi
if [[ -n "$budget" && ! "$budget" =~ ^[0-9]+(\.[0-9]+)?$ ]]; then
  fail "--budget=$budget: write hours, e.g. --budget=12 or --budget=0.5"
fi

case "$subcommand" in
  "") fail "a subcommand is missing; it is one of $steps (--help explains them)" ;;
  create) need_slice && need_type ;;
  install | logs | status | delete) need_slice ;;
  run) need_slice && need_run ;;
  fetch)
    need_workdir
    if [[ "$workdir" != gs://* ]]; then
      need_slice
    fi
    ;;
  all)
    need_slice && need_type && need_run
    # Found out here, before the slice is paid for.
    if [[ -z "$repo" && "$config" != caprl_jax:* && ! -f "$repository/${config%%:*}" ]]; then
      fail "--config=$config: there is no file ${config%%:*} in $repository"
    fi
    ;;
  *) fail "unknown subcommand $subcommand; it is one of $steps (--help explains them)" ;;
esac

if [[ -z "$dry_run" ]] && ! command -v gcloud >/dev/null 2>&1; then
  fail "gcloud is not installed (https://cloud.google.com/sdk/docs/install); --dry-run shows the commands without it"
fi

call cd "$repository"
cd "$repository" # in a dry run too: files of secrets are looked at
if [[ -n "$secrets" && ("$subcommand" == run || "$subcommand" == all) ]]; then
  check_secrets "$secrets"
fi
trap on_exit EXIT
case "$subcommand" in
  create) step_create ;;
  install) step_install ;;
  run) step_run ;;
  logs) step_logs ;;
  status) step_status ;;
  fetch) step_fetch ;;
  delete) step_delete ;;
  all) step_all ;;
esac
exit "$run_code"
