#!/usr/bin/env bash
# Set-up, then the tests. Further arguments that are no flag of ours go to pytest (`tests/test_submit.py`, `-k NAME`).
#
#   bash tests/run.sh            everything but the suites below
#   bash tests/run.sh --slow     those that take minutes, too
set -euo pipefail

suites=(slow)  # pytest markers of suites that run only when asked for: one word here and one in pyproject.toml

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
left_out=("${suites[@]}")
arguments=()
for argument in "$@"; do
    name=${argument#--}
    if [[ $argument == --* && " ${suites[*]} " == *" $name "* ]]; then
        mapfile -t left_out < <(printf '%s\n' "${left_out[@]}" | grep -vx "$name" || true)
    elif [[ $argument == --* ]]; then
        echo "tests/run.sh: unknown flag $argument; there is: ${suites[*]/#/--}" >&2
        exit 2
    else
        arguments+=("$argument")
    fi
done
markers=""
for name in "${left_out[@]}"; do markers+="${markers:+ and }not $name"; done

bash clusters/setup_node.sh
set_up=$SECONDS
status=0
export PYTHONFAULTHANDLER=1  # a crash of native code says where, in the processes that tests start too
"${KRRST_VENV:-$root/.venv}/bin/python" -m pytest -m "$markers" --durations=10 "${arguments[@]}" || status=$?
echo "tests/run.sh: set-up $set_up s, tests $((SECONDS - set_up)) s"
exit $status
