#!/usr/bin/env bash
# From a laptop with gcloud to a finished run on a Cloud TPU slice. `bash launch/tpu_vm.sh --help` explains it.
#
# It also runs in the bash 3.2 of macOS: no ${x@Q}, no mapfile, and empty arrays only as ${a[@]+"${a[@]}"}.
set -euo pipefail

# For its `fail`, `repository` and `judge_package`.
# shellcheck source=launch/quickstart.sh
source "$(dirname "${BASH_SOURCE[0]}")/quickstart.sh"

usage() {
  cat <<'EOF'
Trains on a Cloud TPU slice: makes it, installs caprl_jax on every worker, runs, follows the log, fetches the result.

  bash launch/tpu_vm.sh SUBCOMMAND FLAGS [-- OVERRIDES]

  bash launch/tpu_vm.sh all --name=caprl --zone=us-west4-a --type=v5litepod-8 --quickstart \
    --config=configs/quickstart.py --workdir=runs/tpu -- --config.evaluate.batch_size=16

Subcommands, and the flags each of them needs:
  create    make the slice                                           --name --zone --type
  install   copy this working tree to all workers, install it there  --name --zone
  run       start the run on all workers; it outlives the ssh        --name --zone --config --workdir
  logs      follow the log of worker 0 until the run ends            --name --zone
  fetch     copy the workdir to this machine                         --workdir; unless it is gs://, --name --zone
  delete    delete the slice, without asking again                   --name --zone
  all       the steps above in a row; `delete` only with --delete    --name --zone --type --config --workdir
A subcommand ignores the flags it does not need, so one line of flags serves every step.

Flags (--flag=VALUE or --flag VALUE):
  --name       name of the slice: lower-case letters, digits and hyphens
  --zone       e.g. us-west4-a; `gcloud compute tpus accelerator-types list --zone=ZONE` shows what a zone has
  --type       accelerator type, e.g. v5litepod-8, v5p-8, v6e-8
  --version    TPU software version; without it, the one for JAX on that type
  --project    Google Cloud project; without it, gcloud's default
  --spot       a spot slice: cheaper, and may be taken away at any time
  --queued     ask by a queued resource and wait until it is active; give it to `delete` too
  --repo       clone this git URL on the workers instead of copying this working tree
  --extras     extras of caprl_jax to install (default: tpu)
  --quickstart install what configs/quickstart.py needs too: the extra `quickstart` and the judge's weights
  --config     config file, as caprl_jax.main takes it
  --workdir    folder of the run: relative to the copy of the repository on the workers, or gs://BUCKET/FOLDER
  --to         folder on this machine that `fetch` copies the workdir into (default: runs)
  --delete     `all` deletes the slice once the run has ended and its workdir is here
  --dry-run    print every command, quoted for the shell, and run none; needs no gcloud
  --help       this page

A slice of several workers (v5litepod-16, v5p-16 and larger) needs a workdir in gs://: its workers write one checkpoint
together. The bucket is mounted on the workers with gcsfuse, so the slice's service account must be allowed to write to
it. A workdir in gs:// also survives the loss of a spot slice: `delete`, then `all` with the same flags resumes the run.

HF_TOKEN, if set, is passed on to the run in a file that is removed once the run has read it. It is never printed.
Relative paths on this machine are relative to the repository. Exit codes: 2 for bad flags, else that of the run.
EOF
}

# ---- printing and running commands ----

# quote WORD...: the words as one line for the shell. Unlike printf %q it leaves a text of several lines readable.
quote() {
  local word rest quoted line="" apostrophe="'"
  for word in "$@"; do
    if [[ "$word" =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then
      quoted="$word"
    else
      quoted="'"
      rest="$word"
      while [[ "$rest" == *"$apostrophe"* ]]; do
        quoted+="${rest%%"$apostrophe"*}'\\''"
        rest="${rest#*"$apostrophe"}"
      done
      quoted+="$rest'"
    fi
    line+="${line:+ }$quoted"
  done
  printf '%s\n' "$line"
}

say() {
  if [[ -n "$dry_run" ]]; then
    echo "# $*"
  else
    echo "$*" >&2
  fi
}

# call WORD...: every command goes through here or `call_lines`, so that a dry run prints just what would be run.
call() {
  if [[ -n "$dry_run" ]]; then
    quote "$@"
  else
    "$@" </dev/null
  fi
}

call_lines() {
  if [[ -n "$dry_run" ]]; then
    printf '%s\n' "$1"
  else
    eval "$1"
  fi
}

# --quiet: gcloud takes the default answer. A question nobody sees would hold up a slice that is being paid for.
tpu() { # tpu SUBCOMMAND ARGUMENT...
  call gcloud compute tpus tpu-vm "$@" --zone="$zone" ${project:+"--project=$project"} --quiet
}

queued_resource() {
  call gcloud compute tpus queued-resources "$@" --zone="$zone" ${project:+"--project=$project"} --quiet
}

on_worker() { # on_worker WORKER SCRIPT [SSH_FLAG]
  tpu ssh "$name" --worker="$1" ${3:+"--ssh-flag=$3"} --command="$2"
}

# This script's own line for another subcommand, with the flags that name the slice.
own_line() {
  quote bash launch/tpu_vm.sh "$1" --name="$name" --zone="$zone" ${project:+"--project=$project"} \
    ${queued:+--queued}
}

remind_of_cost() {
  say "$name costs money until it is deleted: $(own_line delete)"
}

slice_exists="" # as far as this process knows
token_file="build/tpu_vm/hf_token"

# shellcheck disable=SC2329 # the trap at the end calls it
on_exit() {
  if [[ -z "$dry_run" ]]; then
    rm -f "$token_file"
    if [[ -n "$slice_exists" ]]; then
      remind_of_cost
    fi
  fi
}

# ---- what runs on the workers ----
# Each prints a script for the worker's shell. Values come before it as assignments, quoted by `quote`. All may run
# twice, because gcloud repeats a command whose connection broke.
#   ~/caprl_jax      the repository, with .venv in it
#   ~/caprl_jax_run  command, pid, log.txt and exit_code of the run

remote_clone() { # repo
  cat <<'EOF'
set -eu
if [ -d ~/caprl_jax/.git ]; then
  git -C ~/caprl_jax pull --quiet --ff-only
else
  git clone --quiet --depth=1 "$repo" ~/caprl_jax
fi
EOF
}

remote_unpack() {
  cat <<'EOF'
set -eu
mkdir -p ~/caprl_jax
tar -xzf ~/caprl_jax_run/code.tar.gz -C ~/caprl_jax
EOF
}

# uv brings a Python of its own: that of the TPU images is 3.10, which is too old.
remote_environment() { # extras, judge
  cat <<'EOF'
set -eu
PATH="$HOME/.local/bin:$PATH"
command -v uv >/dev/null || python3 -m pip install --quiet --user uv ||
  python3 -m pip install --quiet --user --break-system-packages uv
cd ~/caprl_jax
[ -x .venv/bin/python ] || uv venv --quiet --seed --python 3.12 .venv
uv pip install --quiet --python .venv/bin/python --editable ".[$extras]"
[ -z "$judge" ] || uv pip install --quiet --python .venv/bin/python --no-deps "$judge"
.venv/bin/python -m caprl_jax.main --help >/dev/null
echo "caprl_jax is installed on $(hostname)"
EOF
}

# The metadata caches are off because the workers must see each other's files at once.
remote_mount() { # bucket
  cat <<'EOF'
set -eu
if ! command -v gcsfuse >/dev/null; then
  curl -fsSLo /tmp/gcsfuse.deb \
    https://github.com/GoogleCloudPlatform/gcsfuse/releases/download/v3.2.0/gcsfuse_3.2.0_amd64.deb
  sudo apt-get -qq -o DPkg::Lock::Timeout=300 update
  sudo apt-get -qq -o DPkg::Lock::Timeout=300 install -y /tmp/gcsfuse.deb
fi
mkdir -p ~/gcs/"$bucket"
mountpoint -q ~/gcs/"$bucket" || gcsfuse --implicit-dirs --rename-dir-limit=100000 \
  --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 "$bucket" ~/gcs/"$bucket"
EOF
}

# setsid makes the run a process group of its own, which one kill ends whole. The trap is for the moment before nohup
# is at work, in which the connection may already close.
remote_start() { # the run's command as "$@"
  cat <<'EOF'
set -eu
cd ~/caprl_jax_run
if [ -f pid ] && kill -0 "$(cat pid)" 2>/dev/null; then
  rm -f hf_token
  if [ "$(cat command)" = "$*" ]; then
    echo "already running on $(hostname)"
    exit 0
  fi
  echo "error: $(hostname) still runs: $(cat command)" >&2
  echo "wait for it (logs), or end it on every worker: kill -- -\$(cat ~/caprl_jax_run/pid)" >&2
  exit 1
fi
if [ -f hf_token ]; then
  HF_TOKEN="$(cat hf_token)"
  export HF_TOKEN
  rm -f hf_token
fi
rm -f exit_code
echo "$*" >command
: >log.txt
cd ~/caprl_jax
trap '' HUP
nohup setsid bash -c "\"\$@\"; echo \$? >~/caprl_jax_run/exit_code" run "$@" \
  >>~/caprl_jax_run/log.txt 2>&1 </dev/null &
echo $! >~/caprl_jax_run/pid
echo "started on $(hostname)"
EOF
}

remote_follow() {
  cat <<'EOF'
cd ~/caprl_jax_run && [ -f pid ] || exit 1
exec tail -n 200 --pid="$(cat pid)" -f log.txt
EOF
}

# Alive first: the exit code is written before the process is gone.
remote_state() {
  cat <<'EOF'
cd ~/caprl_jax_run && [ -f pid ] || { echo none; exit 0; }
if kill -0 "$(cat pid)" 2>/dev/null; then echo running; elif [ -f exit_code ]; then cat exit_code; else echo lost; fi
EOF
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

token_lines() {
  cat <<EOF
mkdir -p build/tpu_vm
(umask 077 && rm -f $token_file && printenv HF_TOKEN >$token_file)
EOF
}

# ---- the steps ----

step_create() {
  say "Making $name ($type, $version${spot:+, spot}) in $zone ..."
  slice_exists=perhaps
  if [[ -z "$queued" ]]; then
    tpu create "$name" --accelerator-type="$type" --version="$version" ${spot:+--spot}
  else
    queued_resource create "$name" --node-id="$name" --accelerator-type="$type" --runtime-version="$version" \
      ${spot:+--spot}
    wait_until_active
  fi
}

wait_until_active() {
  local state=""
  say "Waiting until $name is active (asking every minute) ..."
  while :; do
    if [[ -n "$dry_run" ]]; then
      queued_resource describe "$name" --format='value(state.state)'
      return
    fi
    state="$(queued_resource describe "$name" --format='value(state.state)')" || state="unknown"
    case "$state" in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED)
        fail "the queued resource $name is $state: no capacity, no quota, or taken away;" \
          "'gcloud compute tpus queued-resources describe $name --zone=$zone' says which"
        ;;
    esac
    say "$name: ${state:-unknown}"
    sleep 60
  done
}

step_install() {
  local judge="" with="$extras"
  if [[ -n "$quickstart" ]]; then
    with="$extras,quickstart"
    judge="$judge_package"
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
    tpu scp build/tpu_vm/code.tar.gz "$name:caprl_jax_run/" --worker=all
    on_worker all "$(remote_unpack)"
  fi
  on_worker all "extras=$(quote "$with")"$'\n'"judge=$(quote "$judge")"$'\n'"$(remote_environment)"
}

step_run() {
  local command remote="$workdir" bucket=""
  say "Starting the run on all workers of $name ..."
  if [[ "$workdir" == gs://* ]]; then
    # shellcheck disable=SC2088 # caprl_jax.main expands the ~, over there
    remote="~/gcs/${workdir#gs://}"
    bucket="${workdir#gs://}"
    bucket="${bucket%%/*}"
    on_worker all "bucket=$(quote "$bucket")"$'\n'"$(remote_mount)"
  fi
  if [[ -n "${HF_TOKEN:-}" ]]; then
    # By scp rather than in a command: those can be read in the list of processes.
    call_lines "$(token_lines)"
    tpu scp "$token_file" "$name:caprl_jax_run/" --worker=all
    call rm -f "$token_file"
  fi
  # --distributed is right on one worker too, and TPU VMs do not set the variables that main looks for.
  command="$(quote .venv/bin/python -m caprl_jax.main --config="$config" --workdir="$remote" --distributed \
    ${overrides[@]+"${overrides[@]}"})"
  on_worker all "set -- $command"$'\n'"$(remote_start)"
}

# Follows the log until the run has ended and leaves its exit code in `run_code`. What ended the following (the run,
# the connection, gcloud) cannot be told from its exit code, so the worker is asked.
step_logs() {
  local state="" began=0 failures=0
  say "Following worker 0 of $name; the run does not depend on it ..."
  if [[ -n "$dry_run" ]]; then
    on_worker 0 "$(remote_follow)" -oServerAliveInterval=30
    on_worker 0 "$(remote_state)"
    return
  fi
  trap 'say "The run goes on; follow it with: $(own_line logs)"; exit 130' INT
  while :; do
    began="$SECONDS"
    on_worker 0 "$(remote_follow)" -oServerAliveInterval=30 || true
    state="$(on_worker 0 "$(remote_state)")" || state="unreachable"
    case "$state" in
      none) fail "no run was started on $name; start one with the subcommand run" ;;
      lost)
        fail "the run on worker 0 of $name ended without an exit code: the worker restarted, or the run was killed;" \
          "the subcommand run starts it again, from its last checkpoint"
        ;;
      [0-9] | [0-9][0-9] | [0-9][0-9][0-9]) break ;;
    esac
    if ((SECONDS - began > 60)); then
      failures=0
    fi
    failures=$((failures + 1))
    if ((failures > 30)); then
      echo "error: worker 0 of $name cannot be followed; the run may go on. Again with: $(own_line logs)" >&2
      exit 1
    fi
    say "The connection ended ($state); trying again in 10 seconds ..."
    sleep 10
  done
  trap - INT
  run_code="$state"
  say "The run ended with exit code $run_code."
}

step_fetch() {
  say "Copying $workdir to $to/$(basename "$workdir") ..."
  call mkdir -p "$to"
  case "$workdir" in
    gs://*) call gcloud storage cp --recursive "$workdir" "$to/" ;;
    /* | "~"*) tpu scp --recurse "$name:$workdir" "$to/" --worker=0 ;;
    *) tpu scp --recurse "$name:caprl_jax/$workdir" "$to/" --worker=0 ;;
  esac
}

step_delete() {
  say "Deleting $name ..."
  if [[ -z "$queued" ]]; then
    tpu delete "$name"
  else
    queued_resource delete "$name" --force # --force: with its nodes
  fi
  slice_exists=""
}

# A failed run is fetched and deleted too; when a step fails, and so when the workdir is not here, nothing is deleted.
step_all() {
  local answer=""
  step_create
  step_install
  step_run
  step_logs
  step_fetch
  if [[ -z "$delete" && -z "$dry_run" && -t 0 && -t 1 ]]; then
    read -r -p "Delete $name now? It costs money until it is deleted. [y/N] " answer || true
  fi
  if [[ -n "$delete" || "$answer" == [yY]* ]]; then
    step_delete
  elif [[ -n "$dry_run" ]]; then
    remind_of_cost
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

need_run() {
  need --config "$config" configs/quickstart.py
  need_workdir
  # All types have one worker up to 8 chips or cores, and several from there.
  if [[ "$workdir" != gs://* && -n "$type" ]] && ((10#${type##*-} > 8)); then
    fail "--workdir=$workdir: $type has several workers, which need one folder that all of them see;" \
      "use --workdir=gs://BUCKET/FOLDER"
  fi
}

steps="create, install, run, logs, fetch, delete, all"
subcommand="" name="" zone="" type="" version="" project="" repo="" extras="tpu" config="" workdir="" to="runs"
spot="" queued="" quickstart="" delete="" dry_run=""
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
    --name | --zone | --type | --version | --project | --repo | --extras | --config | --workdir | --to)
      if (($# < 2)) || [[ "$2" == --* ]]; then
        fail "$1 needs a value: $1=VALUE (--help lists the flags)"
      fi
      printf -v "${1#--}" '%s' "$2"
      shift
      ;;
    --name=* | --zone=* | --type=* | --version=* | --project=* | --repo=* | --extras=* | --config=* | --workdir=* | \
      --to=*)
      flag="${1%%=*}"
      printf -v "${flag#--}" '%s' "${1#*=}"
      ;;
    --config.* | --noconfig.*) fail "$1: values of the config come after a --, at the end: -- $1" ;;
    -*) fail "unknown flag $1; --help lists the flags, and flags of caprl_jax.main come after a --" ;;
    *)
      if [[ -n "$subcommand" ]]; then
        fail "unexpected argument $1 after the subcommand $subcommand; flags are written --flag=VALUE"
      fi
      subcommand="$1"
      ;;
  esac
  shift
done

while [[ "$workdir" == ?*/ ]]; do
  workdir="${workdir%/}"
done

case "$subcommand" in
  "") fail "a subcommand is missing; it is one of $steps (--help explains them)" ;;
  create) need_slice && need_type ;;
  install | logs | delete) need_slice ;;
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
    if [[ -z "$repo" && ! -f "$repository/${config%%:*}" ]]; then
      fail "--config=$config: there is no file ${config%%:*} in $repository"
    fi
    ;;
  *) fail "unknown subcommand $subcommand; it is one of $steps (--help explains them)" ;;
esac

if [[ -z "$dry_run" ]] && ! command -v gcloud >/dev/null 2>&1; then
  fail "gcloud is not installed (https://cloud.google.com/sdk/docs/install); --dry-run shows the commands without it"
fi

call cd "$repository"
trap on_exit EXIT
case "$subcommand" in
  create) step_create ;;
  install) step_install ;;
  run) step_run ;;
  logs) step_logs ;;
  fetch) step_fetch ;;
  delete) step_delete ;;
  all) step_all ;;
esac
exit "$run_code"
