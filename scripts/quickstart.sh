#!/usr/bin/env bash
# Trains an agent from nothing: environment, installation, data, warm start, reinforcement learning.
set -euo pipefail
started="$(date +%s)"
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

usage() {
    cat <<EOF
usage: scripts/quickstart.sh [--task sql|qa|math] [--out DIR] [--seed N] [--database FILE.sqlite] [--smoke] [--controls] [--help]

  --task sql|qa|math      text-to-SQL in LangGraph (the default), multi-hop questions in the OpenAI Agents SDK, or word problems in AutoGen
  --out DIR               where the results go (default: runs/quickstart, or runs/quickstart_TASK); a run that was stopped there goes on
  --seed N                seed of everything random (default: 0)
  --database FILE.sqlite  learn to answer questions over this file instead of generated databases
  --smoke                 the same path in a few minutes, with too little training to show much
  --controls              also train the two controls: more supervised steps, and shuffled rewards
EOF
}

absolute() { case "$1" in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }

out="" task=sql seed=0 passed=()
while (($#)); do
    case "$1" in
        --task | --out | --seed | --database)
            (($# > 1)) || die 2 "$1 needs a value; see --help."
            set -- "$1=$2" "${@:3}"
            continue
            ;;
        --task=*) task="${1#*=}" ;;
        --out=*) out="$(absolute "${1#*=}")" ;;
        --seed=*) seed="${1#*=}" ;;
        --database=*)
            database="$(absolute "${1#*=}")"
            [[ -f "$database" ]] || die 2 "there is no database file $database."
            passed+=("--database=$database")
            ;;
        --smoke | --controls) passed+=("$1") ;;
        --help | -h)
            usage
            exit 0
            ;;
        *) die 2 "unknown argument $1; see --help." ;;
    esac
    shift
done
case "$task" in
    sql) module=text_to_sql out="${out:-$ROOT/runs/quickstart}" ;;
    qa) module=multi_hop_qa ;;
    math) module=math_tool ;;
    *) die 2 "--task is sql, qa or math, not '$task'." ;;
esac
out="${out:-$ROOT/runs/quickstart_$task}"
[[ "$task" == sql || -z "${database:-}" ]] || die 2 "--database goes with --task sql."
[[ "$seed" =~ ^[0-9]+$ ]] || die 2 "--seed takes a whole number from 0, not '$seed'."

setup_env agents
cd "$ROOT"
exec "$PYTHON" -m "experiments.$module" --out="$out" --seed="$seed" ${passed[@]+"${passed[@]}"} \
    --seconds_install="$(($(date +%s) - started))" --started="$started"
