#!/usr/bin/env bash
# Style, types and the whole test suite; --fast leaves out the tests marked slow.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

selection=()
for argument in "$@"; do
    case "$argument" in
        --fast)
            selection=(-m "not slow")
            # A fifth less time, on tests of advantages and losses; what XLA's optimisations do to a program is left to the whole suite.
            export XLA_FLAGS="${XLA_FLAGS:-} --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
            ;;
        --help | -h)
            echo "usage: scripts/test.sh [--fast] [--help]    style, types and all tests; --fast leaves out the slow ones"
            exit 0
            ;;
        *) die 2 "unknown argument $argument; see --help." ;;
    esac
done

setup_env test
cd "$ROOT"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy lightningrl experiments
# Tests of one file share compiled programs, so a file stays in one process; tests/conftest.py says which come first.
exec "$PYTHON" -m pytest -q -n auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder ${selection[@]+"${selection[@]}"}
