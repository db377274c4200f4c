#!/usr/bin/env bash
# Makes this machine able to run krrst_dist: the system packages that FFCV is built against, a virtual environment, and
# the pinned Python packages in it. Used by jobs/quickstart.sh, by tests/run.sh and on every node of a cluster.
# Debian or Ubuntu, as root or with sudo; elsewhere it says what to install. When nothing changed it does nothing.
#
#   bash clusters/setup_node.sh                    makes .venv in the project
#   KRRST_VENV=DIR bash clusters/setup_node.sh     makes it in DIR
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${KRRST_VENV:-$root/.venv}
constraints=$root/clusters/constraints.txt

say() { echo "set-up: $*"; }
fail() { echo "set-up: $*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }
suitable() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1; }

# What the environment was made from. The root is part of it because the package is installed in place.
stamp=$(cat "$constraints" "$root/pyproject.toml" "${BASH_SOURCE[0]}" <(echo "$root") | sha256sum | cut -d' ' -f1)
if [ "$(cat "$venv/.krrst-setup" 2>/dev/null)" = "$stamp" ] && suitable "$venv/bin/python"; then
    say "nothing to do, $venv is up to date"
    exit 0
fi

find_python() {
    local name
    for name in python3 python3.12 python3.11; do
        if have "$name" && suitable "$name"; then echo "$name"; return; fi
    done
}
can_build() {  # venvs, and compiled extensions
    "$1" -c 'import ensurepip, os, sysconfig; assert os.path.exists(sysconfig.get_path("include") + "/Python.h")' >/dev/null 2>&1
}
library() { have pkg-config && pkg-config --exists "$1"; }
shared_library() { [[ $(PATH=$PATH:/sbin:/usr/sbin ldconfig -p 2>/dev/null) == *"$1"* ]]; }

# missing: Debian's package names of what is not there
list_missing() {
    missing=()
    python=$(find_python)
    if [ -z "$python" ]; then
        missing+=("python3.12")  # or 3.11, see choose_python
    elif ! can_build "$python"; then
        local version
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        missing+=("python$version-venv" "python$version-dev")
    fi
    have c++ || missing+=(g++)
    have pkg-config || missing+=(pkg-config)
    library opencv4 || missing+=(libopencv-dev)
    library libturbojpeg || missing+=(libturbojpeg0-dev)
    shared_library libGL.so.1 || missing+=(libgl1)  # opencv-python, which FFCV imports, wants these two
    shared_library libgthread-2.0.so.0 || missing+=(libglib2.0-0)
}
# Without a suitable Python: the newest one that this release packages.
choose_python() {
    local version packages=()
    [ -z "$python" ] || return 0
    for version in 3.12 3.11; do
        if [ -n "$(apt-cache show "python$version" 2>/dev/null)" ]; then
            packages=("python$version" "python$version-venv" "python$version-dev")
            missing=("${packages[@]}" "${missing[@]:1}")
            return
        fi
    done
    fail "needs Python 3.11 or 3.12, and this release packages neither; install one so that python3.12 or python3.11 is on PATH (with venv and headers), then run this again"
}

started=$SECONDS
list_missing
if [ ${#missing[@]} -gt 0 ]; then
    have apt-get || fail "this machine lacks (in Debian's names): ${missing[*]}. There is no apt-get here: install their counterparts
(Python 3.11 or 3.12 with venv and headers, a C++ compiler, pkg-config, the development files of OpenCV 4 and of libturbojpeg, libGL and glib) and run this again"
    as_root=(env DEBIAN_FRONTEND=noninteractive)
    if [ "$(id -u)" -ne 0 ]; then
        have sudo || fail "this machine lacks: ${missing[*]}. Installing them takes root or sudo: run this as root, or have them installed, then run this again"
        as_root=(sudo env DEBIAN_FRONTEND=noninteractive)
    fi
    "${as_root[@]}" apt-get update -qq
    choose_python
    say "installing system packages: ${missing[*]}"
    "${as_root[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
    list_missing
    [ ${#missing[@]} -eq 0 ] || fail "still missing after installation: ${missing[*]}"
fi

if [ -e "$venv" ]; then
    suitable "$venv/bin/python" || fail "$venv is there but holds no Python 3.11 or 3.12; remove it, or name another place in KRRST_VENV"
else
    say "making $venv with $("$python" --version)"
    "$python" -m venv "$venv"
fi
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet --constraint "$constraints")
say "installing Python packages (minutes the first time)"
"${pip[@]}" --upgrade pip
"${pip[@]}" torch  # first and alone, so that no other package chooses its build
"${pip[@]}" --editable "$root[test]"
"$venv/bin/python" -c 'import cv2, ffcv' || fail "FFCV was installed but does not import, see above; krrst doctor tells more"
echo "$stamp" > "$venv/.krrst-setup"
say "done in $((SECONDS - started)) s"
