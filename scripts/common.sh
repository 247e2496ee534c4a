# Shared by the scripts beside it: the virtual environment, the Debian packages, the printing.
# To be sourced by bash, with the repository root as working directory.

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

say() { printf '\n== %s\n' "$*"; }

fail() {
  printf 'error: %s\n' "$1" >&2
  shift
  local line
  for line in "$@"; do printf 'hint: %s\n' "$line" >&2; done
  exit 1
}

# Prints a command as a reader would type it, then runs it.
run() {
  printf '\n$ %s\n' "$(quoted "$@")"
  "$@"
}

# Quotes only what needs it: k2 chat -p "What is ...?"
quoted() {
  local word line=""
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then line+=" $word"; else line+=" \"$word\""; fi
  done
  printf '%s' "${line# }"
}

# Name of a Python that k2 can use; empty if there is none.
find_python() {
  local name
  for name in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.14; do
    [ -n "$name" ] && command -v "$name" >/dev/null || continue
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
}

on_debian() { [ "$(uname -s)" = Linux ] && command -v apt-get >/dev/null; }

# Installs the Debian packages that are not there yet: as root on Debian, else says which are missing.
# With "optional" as first argument a failure is told, and not fatal.
need_packages() {
  local optional=no missing=() name
  if [ "$1" = optional ]; then optional=yes; shift; fi
  for name in "$@"; do
    dpkg-query -W -f '${Status}' "$name" 2>/dev/null | grep -q 'ok installed' || missing+=("$name")
  done
  [ ${#missing[@]} -eq 0 ] && return 0
  if [ "$(id -u)" -eq 0 ]; then
    say "installing Debian packages: ${missing[*]}"
    # RUNLEVEL=1: no service that a package brings, such as sshd, is started on this machine.
    if apt-get update -qq && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive \
      apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null; then
      return 0
    fi
  fi
  [ "$optional" = yes ] && { echo "not installed: ${missing[*]}; what needs them is skipped"; return 0; }
  fail "missing packages: ${missing[*]}" "sudo apt-get install ${missing[*]}"
}

# Makes .venv if there is none, and puts it on PATH.
make_environment() {
  local python
  python=$(find_python)
  if [ -z "$python" ] && on_debian; then
    need_packages python3
    python=$(find_python)
  fi
  [ -n "$python" ] || fail "no Python 3.11 or newer on PATH" "install one, or name it: PYTHON=/path/to/python3.12 $0"
  if on_debian && ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then need_packages python3-venv; fi
  # A folder that was moved, or whose Python is gone, cannot be repaired: make it anew.
  if ! .venv/bin/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    say "making the virtual environment .venv with $("$python" --version)"
    rm -rf .venv
    "$python" -m venv .venv
  fi
  export PATH="$PWD/.venv/bin:$PATH"
}

digest() { "$PWD/.venv/bin/python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'; }

# Installs this checkout with the given extras ("dev,mpi", or empty), unless that was done before.
# With "dev" among them, in the versions of constraints.txt; else in the newest that k2 allows.
install_k2() {
  local extras=$1 target=. wanted marker constraints=""
  case ",$extras," in *,dev,*) constraints=constraints.txt ;; esac
  [ -n "$extras" ] && target=".[$extras]"
  marker=.venv/installed-${extras//,/-}
  wanted=$({ cat pyproject.toml ${constraints:+"$constraints"}; pwd; } | digest)
  if [ "$(cat "$marker" 2>/dev/null)" = "$wanted" ]; then
    echo "k2 is installed in .venv"
    return
  fi
  say "installing k2 into .venv (the first time takes a minute or two)"
  set -- ${constraints:+--constraint "$constraints"} --editable "$target"
  printf '$ pip install %s\n' "$(quoted "$@")"
  .venv/bin/python -m pip install --quiet "$@"
  rm -rf k2cli.egg-info  # a leftover of the build; what counts lies in .venv
  printf '%s' "$wanted" >"$marker"
}
