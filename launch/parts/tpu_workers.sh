# shellcheck shell=bash
# What launch/tpu_vm.sh runs on the workers of a slice. Sourced.
#
# Each function prints a script for the worker's shell. Values come before it as assignments, quoted by `quote`. All may
# run twice, because gcloud repeats a command whose connection broke.
#   ~/caprl_jax      the repository, with .venv in it
#   ~/caprl_jax_run  command, pid, log.txt and exit_code of the run; pid and log of the deadline

remote_clone() { # repo
  cat <<'END'
set -eu
if [ -d ~/caprl_jax/.git ]; then
  git -C ~/caprl_jax pull --quiet --ff-only
else
  git clone --quiet --depth=1 "$repo" ~/caprl_jax
fi
END
}

remote_unpack() {
  cat <<'END'
set -eu
mkdir -p ~/caprl_jax
tar -xzf ~/caprl_jax_run/code.tar.gz -C ~/caprl_jax
END
}

# uv brings a Python of its own: that of the TPU images is 3.10, which is too old.
remote_environment() { # extras, judge
  cat <<'END'
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
END
}

# The metadata caches are off because the workers must see each other's files at once.
remote_mount() { # bucket
  cat <<'END'
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
END
}

# setsid makes the run a process group of its own, which one kill ends whole; its shell outlives SIGTERM, to write the
# exit code. The trap of HUP is for the moment before nohup is at work, in which the connection may already close.
remote_start() { # the run's command as "$@"
  cat <<'END'
set -eu
cd ~/caprl_jax_run
if [ -f pid ] && kill -0 "$(cat pid)" 2>/dev/null; then
  rm -f secrets
  if [ "$(cat command)" = "$*" ]; then
    echo "already running on $(hostname)"
    exit 0
  fi
  echo "error: $(hostname) still runs: $(cat command)" >&2
  echo "wait for it (logs), or end it on every worker: kill -- -\$(cat ~/caprl_jax_run/pid)" >&2
  exit 1
fi
if [ -f secrets ]; then
  chmod 600 secrets
  while IFS= read -r line || [ -n "$line" ]; do
    case "$line" in '' | '#'*) ;; *) export "$line" ;; esac
  done <secrets
  rm -f secrets
fi
rm -f exit_code
echo "$*" >command
: >log.txt
cd ~/caprl_jax
trap '' HUP
nohup setsid bash -c "trap : TERM; \"\$@\"; echo \$? >~/caprl_jax_run/exit_code" run "$@" \
  >>~/caprl_jax_run/log.txt 2>&1 </dev/null &
echo $! >~/caprl_jax_run/pid
echo "started on $(hostname)"
END
}

# A budget holds although the machine that asked for it is closed: worker 0 ends the run and then its own slice.
remote_deadline() { # secs; the command that deletes the slice as "$@"
  cat <<'END'
set -eu
cd ~/caprl_jax_run
[ ! -f deadline ] || kill -- -"$(cat deadline)" 2>/dev/null || true
trap '' HUP
nohup setsid bash -c "sleep $secs; kill -TERM -- -\$(cat pid); sleep 300; \"\$@\"" deadline "$@" \
  >deadline.txt 2>&1 </dev/null &
echo $! >deadline
END
}

# How long the following lasts is bounded, so that a budget ends it, too.
remote_follow() { # secs
  cat <<'END'
cd ~/caprl_jax_run && [ -f pid ] || exit 1
exec timeout "$secs" tail -n 200 --pid="$(cat pid)" -f log.txt
END
}

# Alive first: the exit code is written before the process is gone.
remote_state() {
  cat <<'END'
cd ~/caprl_jax_run && [ -f pid ] || { echo none; exit 0; }
if kill -0 "$(cat pid)" 2>/dev/null; then echo running; elif [ -f exit_code ]; then cat exit_code; else echo lost; fi
END
}

# SIGTERM makes the run save and end with 75.
remote_stop() { # secs
  cat <<'END'
cd ~/caprl_jax_run && [ -f pid ] || exit 0
kill -TERM -- -"$(cat pid)" 2>/dev/null || exit 0
while [ "$secs" -gt 0 ] && kill -0 "$(cat pid)" 2>/dev/null; do
  sleep 1
  secs=$((secs - 1))
done
END
}
