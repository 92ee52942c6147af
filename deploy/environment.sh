# Sourced by deploy/demo and tests/check: the virtual environment and the system packages they need.
# EDGEPRIV_VENV names another place for the environment; default .venv in the repository.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" PYTHONUNBUFFERED=1 MPLBACKEND=Agg

edgepriv_environment() {  # names of the extras to install
  local root venv extras stamp want
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
  venv="${EDGEPRIV_VENV:-$root/.venv}"
  extras="$(IFS=,; echo "$*")"
  [ -x "$venv/bin/python" ] || edgepriv_make_venv "$venv"
  PY="$venv/bin/python"
  stamp="$venv/.edgepriv-$(printf '%s' "$extras" | tr ',' '-')"
  want="$(cat "$root/pyproject.toml" "$root/deploy/constraints.txt" | sha256sum | cut -d' ' -f1) $root"
  if [ "$(cat "$stamp" 2>/dev/null || true)" != "$want" ]; then
    echo "installing edgepriv[$extras] (the first time takes some minutes)" >&2
    "$PY" -m pip install --quiet --disable-pip-version-check -c "$root/deploy/constraints.txt" \
      "torch==2.13.0" -e "$root[$extras]" >&2
    printf '%s' "$want" > "$stamp"
  fi
  export PATH="$venv/bin:$PATH"
}

edgepriv_make_venv() {  # folder; Debian keeps venv in a package of its own
  echo "making the virtual environment $1" >&2
  if ! python3 -c 'import venv, ensurepip' 2>/dev/null && [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq >&2 || true
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3 python3-venv >/dev/null 2>&1 || true
  fi
  python3 -m venv "$1" || { echo "python3 -m venv does not work here: apt install python3-venv" >&2; return 69; }
}

edgepriv_system_packages() {  # mosquitto, PostgreSQL and Chromium, where they are missing and may be installed
  local missing=() package
  export PATH="$PATH:/usr/sbin:/sbin"
  command -v mosquitto >/dev/null || missing+=(mosquitto)
  ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || missing+=(postgresql)
  command -v chromium >/dev/null || missing+=(chromium)
  [ "${#missing[@]}" -eq 0 ] && return 0
  if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq >&2 || true
    for package in "${missing[@]}"; do
      DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$package" >/dev/null 2>&1 \
        || echo "could not install $package: the tests that need it are skipped, each with its reason" >&2
    done
  else
    echo "missing (not root, so not installed): ${missing[*]}: the tests that need them are skipped, each with its reason" >&2
  fi
}
