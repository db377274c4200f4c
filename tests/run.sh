#!/usr/bin/env bash
# Set-up, then the tests. Further arguments that are no flag of ours go to pytest (`tests/test_submit.py`, `-k NAME`).
#
#   bash tests/run.sh            everything but the suites below
#   bash tests/run.sh --slow     those that take minutes, too
#   bash tests/run.sh --browser  those that drive the result explorer in Chromium, too: on Debian or Ubuntu, as root where it is missing
#   bash tests/run.sh --cluster  those that make several hosts of this machine, too: on Debian or Ubuntu, as root
set -euo pipefail

suites=(slow cluster browser)  # pytest markers of suites that run only when asked for: one word here and one in pyproject.toml

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

# What hosts and bare systems are made of. Debian would start an ssh server on this machine; it is told not to.
install_for_hosts() {
    local packages=(openssh-server rsync iproute2 procps debootstrap) policy=/usr/sbin/policy-rc.d
    dpkg -s "${packages[@]}" >/dev/null 2>&1 && return
    [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null || { echo "tests/run.sh: --cluster takes root on Debian or Ubuntu" >&2; exit 2; }
    if [ ! -e $policy ]; then
        trap "rm -f $policy" EXIT
        printf '#!/bin/sh\nexit 101\n' > $policy && chmod +x $policy
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
}
[[ " ${left_out[*]} " == *" cluster "* ]] || install_for_hosts

install_browser() {
    command -v chromium >/dev/null && return
    [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null || { echo "tests/run.sh: --browser takes Chromium as \`chromium\`; install it" >&2; exit 2; }
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null
}

bash clusters/setup_node.sh
python=${KRRST_VENV:-$root/.venv}/bin/python
if [[ " ${left_out[*]} " != *" browser "* ]]; then
    install_browser
    "$python" -m pip --disable-pip-version-check install --quiet --constraint clusters/constraints.txt playwright
fi
set_up=$SECONDS
status=0
export PYTHONFAULTHANDLER=1  # a crash of native code says where, in the processes that tests start too
"$python" -m pytest -m "$markers" --durations=10 "${arguments[@]}" || status=$?
echo "tests/run.sh: set-up $set_up s, tests $((SECONDS - set_up)) s"
exit $status
