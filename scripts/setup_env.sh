# Sourced by the scripts beside it: `setup_env EXTRA` makes .venv at the root of the checkout and installs the package in it,
# `$PYTHON` is its interpreter. What is installed already for this setup.py and constraints.txt is left as it is.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
PYTHON="$VENV/bin/python"

die() { # STATUS SENTENCE
    printf '%s: %s\n' "$(basename "$0")" "$2" >&2
    exit "$1"
}

_find_python() {
    local name
    for name in python3 python3.13 python3.12 python3.11 python; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            echo "$name"
            return
        fi
    done
    die 1 "Python 3.11 or newer is needed and none was found; python3 is $(python3 --version 2>&1 || echo missing)."
}

_make_venv() {
    local base
    base="$(_find_python)" || exit 1
    echo "Making a virtual environment in $VENV"
    "$base" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
        die 1 "$base has no venv module; install it first (on Debian and Ubuntu: apt-get install python3-venv)."
    "$base" -m venv --clear "$VENV" || die 1 "$base -m venv could not make $VENV (its message is above)."
}

setup_env() { # EXTRA: agents, or test (which includes it)
    local extra="$1" wanted stamp
    # The path is part of it, since an environment does not survive being moved.
    wanted="$(cat "$ROOT/setup.py" "$ROOT/constraints.txt" | cksum) $ROOT"
    for stamp in "$VENV/installed-$extra" "$VENV/installed-test"; do
        if [[ -x "$PYTHON" && -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
            return
        fi
    done
    "$PYTHON" -m pip --version >/dev/null 2>&1 || _make_venv
    echo "Installing lightningrl[$extra] and what it needs (once, a minute or two)"
    # Compiling every module of every package takes half of the time; the few that are imported compile themselves.
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-compile \
        --constraint "$ROOT/constraints.txt" --editable "$ROOT[$extra]" ||
        die 1 "the installation failed (pip's message is above)."
    echo "$wanted" >"$VENV/installed-$extra"
}
