#!/usr/bin/env bash
# One run as several processes on this machine, as on several hosts.
#
#   bash launch/local.sh N [--dry-run] [arguments of caprl_jax.main ...]
#
#   bash launch/local.sh 2 --config=configs/quickstart.py --workdir=runs/two
#
# The processes find each other on the loopback. Where one fails, the others are ended, and the script ends with the exit
# code of the one that failed. Ctrl-C and SIGTERM go to all. On a machine with NVIDIA GPUs each process gets its share of
# them; with TPU chips one process serves all chips, and N is 1.
#   PYTHON                the Python to run (default: .venv/bin/python of the repository, else python3)
#   CAPRL_JAX_GRACE_SECS  how long the others may take to save when one has failed (default: 120; caprl_jax itself ends
#                         them within a minute)
#
# It also runs in the bash 3.2 of macOS, which has no `wait -n`.
set -euo pipefail

# For its `fail` and `repository`.
# shellcheck source=launch/quickstart.sh
source "$(dirname "${BASH_SOURCE[0]}")/quickstart.sh"
# shellcheck source=launch/parts/commands.sh
source "$repository/launch/parts/commands.sh"

count="${1:-}"
[[ "$count" =~ ^[1-9][0-9]*$ ]] || fail "the first argument is how many processes, e.g. bash $0 2 --config=FILE --workdir=DIR"
shift
arguments=()
for argument in "$@"; do
  if [[ "$argument" == --dry-run ]]; then
    dry_run=yes
  else
    arguments+=("$argument")
  fi
done
python="${PYTHON:-}"
if [[ -z "$python" ]]; then
  python="$repository/.venv/bin/python"
  [[ -x "$python" ]] || python=python3
fi

free_port() {
  "$python" -c 'import socket
with socket.socket() as s:
  s.bind(("127.0.0.1", 0))
  print(s.getsockname()[1])'
}

# The numbers of the GPUs of process $1, separated by commas; nothing where there are none to share.
gpus_of() {
  local all each
  if [[ "${JAX_PLATFORMS:-}" == cpu* || -n "${CUDA_VISIBLE_DEVICES:-}" ]] || ! command -v nvidia-smi >/dev/null 2>&1; then
    return
  fi
  all="$(nvidia-smi --list-gpus | wc -l)"
  each=$((all / count))
  ((each > 0)) || fail "$count processes and $all GPUs: start at most one process for each GPU"
  seq -s, $(($1 * each)) $((($1 + 1) * each - 1))
}

if [[ -n "$dry_run" ]]; then
  port=PORT
else
  port="$(free_port)"
fi
shares=()
for ((i = 0; i < count; i++)); do
  shares+=("$(gpus_of "$i")")
done

if [[ -n "$dry_run" ]]; then
  for ((i = 0; i < count; i++)); do
    quote env ${shares[i]:+"CUDA_VISIBLE_DEVICES=${shares[i]}"} JAX_COORDINATOR_ADDRESS="127.0.0.1:$port" \
      JAX_NUM_PROCESSES="$count" JAX_PROCESS_ID="$i" "$python" -m caprl_jax.main --distributed \
      ${arguments[@]+"${arguments[@]}"}
  done
  exit 0
fi

folder="$(mktemp -d)"
pids=()

# Job control makes each process a group of its own, which gets the signals that are sent to it and no others.
set -m
for ((i = 0; i < count; i++)); do
  (
    code=0
    trap : TERM INT # the shell goes on, to note the exit code
    env ${shares[i]:+"CUDA_VISIBLE_DEVICES=${shares[i]}"} JAX_COORDINATOR_ADDRESS="127.0.0.1:$port" \
      JAX_NUM_PROCESSES="$count" JAX_PROCESS_ID="$i" "$python" -m caprl_jax.main --distributed \
      ${arguments[@]+"${arguments[@]}"} || code=$?
    echo "$code" >"$folder/$i.part"
    mv "$folder/$i.part" "$folder/$i"
  ) &
  pids+=("$!")
done
set +m

send() { # send SIGNAL
  local pid
  for pid in "${pids[@]}"; do
    kill "-$1" -- "-$pid" 2>/dev/null || true
  done
}
trap 'send INT' INT
trap 'send TERM' TERM
trap 'send KILL; rm -rf "$folder"' EXIT

ended=0 first="" began="$SECONDS" grace="${CAPRL_JAX_GRACE_SECS:-120}" told=""
while ((ended < count)); do
  ended=0
  for ((i = 0; i < count; i++)); do
    if [[ -f "$folder/$i" ]]; then
      ended=$((ended + 1))
      code="$(cat "$folder/$i")"
      if [[ "$code" != 0 && -z "$first" ]]; then
        first="$code"
        began="$SECONDS"
        if ((count > 1)); then
          echo "process $i ended with exit code $code; the others are given $grace seconds to end" >&2
        fi
      fi
    fi
  done
  if [[ -n "$first" ]] && ((ended < count && SECONDS - began >= grace)); then
    if [[ -z "$told" ]]; then
      told=yes
      send TERM
    elif ((SECONDS - began >= grace + 5)); then
      send KILL
      break
    fi
  fi
  sleep 0.2
done
exit "${first:-0}"
