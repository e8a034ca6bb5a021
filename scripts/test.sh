#!/usr/bin/env bash
# Sets up, then checks the whole project: ruff, mypy, shellcheck, hadolint, and last the tests.
#
#   scripts/test.sh [PYTEST ARGUMENT…]      for example: scripts/test.sh tests/core -x
#   scripts/test.sh -m slow                 the long tests, which are left out otherwise
#   scripts/test.sh -n0 --pdb …             in one process, as a debugger needs it
#
# Every check runs even if one before it failed, so that all findings are seen at once; the tests run
# only when the checks are clean. No network is needed once scripts/setup.sh has run.

set -euo pipefail
unset CDPATH PYTHONHOME PYTHONPATH

cd -P "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
bin=.venv/bin
failed=''

check() {
  local name=$1 start=$SECONDS
  shift
  printf '%s … ' "$name"
  if output=$("$@" 2>&1 </dev/null); then
    printf 'clean (%d s)\n' $((SECONDS - start))
  else
    printf 'FAILED\n%s\n' "$output"
    failed="$failed, $name"
  fi
}

check 'ruff check' "$bin/python" -m ruff check .
check 'ruff format' "$bin/python" -m ruff format --check .
check 'mypy' "$bin/python" -m mypy
if [[ -x $bin/shellcheck ]]; then
  check 'shellcheck' "$bin/shellcheck" scripts/*.sh .ci/run
else
  echo 'shellcheck is not published for this machine: not run.'
fi
check 'hadolint' "$bin/hadolint" Dockerfile

if [[ -n $failed ]]; then
  printf 'test.sh: failed: %s\n' "${failed#, }" >&2
  exit 1
fi
# A file of tests stays with one process: what its fixtures make is made once.
exec "$bin/python" -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile "$@"
