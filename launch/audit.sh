#!/usr/bin/env bash
# Known vulnerabilities of the packages of an environment, by pip-audit: printed, and never an error.
#
#   bash launch/audit.sh [ENVIRONMENT]     .venv-test where none is named
#
# pip-audit has an environment of its own (.venv-audit), so that it changes nothing in the one that it looks at. It asks
# PyPI; without a network, or after a minute, the script says that nothing was found out.
set -euo pipefail

# shellcheck source=launch/quickstart.sh
source "$(dirname "${BASH_SOURCE[0]}")/quickstart.sh"

# What is installed, but for this package and those that PyPI does not know by name and version.
list_packages() {
  "$1/bin/python" -c 'import importlib.metadata as m
found = {(d.metadata["Name"], d.version.partition("+")[0]) for d in m.distributions()}
print("\n".join(f"{name}=={version}" for name, version in sorted(found) if name and name != "caprl_jax"))'
}

audit() {
  local environment="$1" packages code=0
  packages="$(mktemp)"
  # shellcheck disable=SC2064
  trap "rm -f '$packages'" EXIT
  list_packages "$environment" >"$packages"
  if [[ ! -x .venv-audit/bin/pip-audit ]]; then
    "$environment/bin/python" -m venv .venv-audit
    install .venv-audit pip-audit
  fi
  .venv-audit/bin/pip-audit --requirement "$packages" --no-deps --disable-pip --progress-spinner off || code=$?
  ((code <= 1)) # 1: it has found some, which is what it prints
}

cd "$repository"
if [[ "${1:-}" == --inside ]]; then
  audit "$2"
else
  environment="${1:-.venv-test}"
  [[ -x "$environment/bin/python" ]] || fail "$environment is no environment; make it with launch/test.sh"
  echo "Packages of $environment with known vulnerabilities (pip-audit):" >&2
  timeout 60 bash "${BASH_SOURCE[0]}" --inside "$environment" </dev/null ||
    echo "warning: pip-audit could not ask (no network, or more than a minute): nothing is known" >&2
fi
