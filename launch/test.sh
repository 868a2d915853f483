#!/usr/bin/env bash
# Every test, in an environment of its own (.venv-test).
#
#   bash launch/test.sh [pytest arguments]          all of them, or e.g. tests/rl/loss_test.py -k clip
#
# PYTHON and CAPRL_JAX_EXTRAS are as in launch/quickstart.sh. The parity tests need torch: where the index offers a
# CUDA build and you want the small CPU one, point PIP_EXTRA_INDEX_URL at an index of CPU builds.
set -euo pipefail

# shellcheck source=launch/quickstart.sh
source "$(dirname "${BASH_SOURCE[0]}")/quickstart.sh"

# The test of report.html opens it in a real browser and is skipped where there is none.
install_browser() {
  local browser
  for browser in chromium chromium-browser google-chrome; do
    if command -v "$browser" >/dev/null 2>&1; then
      return
    fi
  done
  if [[ "$(id -u)" == 0 ]] && command -v apt-get >/dev/null 2>&1; then
    echo "Installing chromium for the report's test ..." >&2
    # The time limit is for systems whose chromium package waits for a snap store.
    if (
      export DEBIAN_FRONTEND=noninteractive
      timeout 120 apt-get update -qq && timeout 300 apt-get install -y -qq --no-install-recommends chromium
    ) </dev/null >/dev/null; then
      return
    fi
    echo "warning: chromium could not be installed" >&2
  fi
  echo "No chromium: the report's browser test will be skipped." >&2
}

# libtpu compiles for TPUs without one: for the test of mode plan. In a folder of its own, because jax would look for chips
# at every start if it saw it.
install_tpu_compiler() {
  local folder="$1" wanted
  if [[ ! -d "$folder" && "$(uname -sm)" == "Linux x86_64" ]]; then
    wanted="$(.venv-test/bin/python -c 'import importlib.metadata as m
print(next(r.split(";")[0] for r in m.requires("jax") if r.startswith("libtpu")))')"
    install .venv-test --no-deps --target "$folder" "$wanted" || {
      rm -rf "$folder"
      echo "warning: $wanted could not be installed; the test that compiles for a TPU will be skipped" >&2
    }
  fi
}

# An emulator of Google's storage and what speaks to it: for the test of buckets. In a folder of their own, because they
# bring some thirty packages that nothing else needs.
install_bucket_emulator() {
  local folder="$1"
  if [[ ! -d "$folder" ]]; then
    install .venv-test --target "$folder" gcp-storage-emulator gcsfs || {
      rm -rf "$folder"
      echo "warning: gcp-storage-emulator could not be installed; the test of buckets will be skipped" >&2
    }
  fi
}

cd "$repository"
export CAPRL_JAX_LIBTPU="$repository/.venv-test/libtpu"
export CAPRL_JAX_BUCKETS="$repository/.venv-test/buckets"
# What is installed outside the environment is downloaded beside what goes into it.
install_browser &
browser=$!
make_environment .venv-test "test${CAPRL_JAX_EXTRAS:+,$CAPRL_JAX_EXTRAS}" torch==2.13.0
install_tpu_compiler "$CAPRL_JAX_LIBTPU" &
tpu_compiler=$!
install_bucket_emulator "$CAPRL_JAX_BUCKETS" &
emulator=$!
# Only its data file is needed, the real Qwen vocabulary; tests that want it are skipped where it is missing.
.venv-test/bin/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("dashscope") is None)' ||
  install .venv-test --no-deps dashscope==2.0.2 || echo "warning: dashscope could not be installed" >&2
# The page of mode demo. gradio wants an older Pillow than the parity tests do, and runs with this one: hence apart.
.venv-test/bin/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("gradio") is None)' || {
  install .venv-test 'gradio>=6' && install .venv-test 'pillow>=13'
} || echo "warning: gradio could not be installed; the demo's browser test will be skipped" >&2
wait "$tpu_compiler" "$emulator" "$browser"
if (($# == 0)); then
  bash launch/audit.sh .venv-test # printed for whoever reads the log; no reason to fail
fi
# File by file, in the order of tests/conftest.py, which puts slow files first. Most of the time goes into compiling,
# which takes one core, and some of it into waiting for processes: hence one worker more than there are cores, as far as
# memory allows.
workers="$(.venv-test/bin/python -c 'import os
gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
print(max(1, min(os.cpu_count() + 1, int(gib // 4))))')"
exec .venv-test/bin/python -m pytest -q -n "$workers" --dist loadfile --no-loadscope-reorder --durations=15 --timeout=1200 "$@"
