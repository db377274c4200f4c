#!/usr/bin/env bash
# Are there known vulnerabilities in the pinned packages (clusters/constraints.txt)? Status 1 where there are, each with its package.
# Without a network, or an advisory database that can be reached, it says so and ends with 0.
set -euo pipefail

accepted=""  # identifiers of what does not concern us, each with the reason in a comment here

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

python=${KRRST_VENV:-$root/.venv}/bin/python
"$python" -m venv "$folder/venv"
if ! "$folder/venv/bin/python" -m pip --disable-pip-version-check install --quiet pip-audit 2>"$folder/why"; then
    echo "audit: not done, pip-audit cannot be installed: $(tail -n 1 "$folder/why")"
    exit 0
fi
timeout 300 "$folder/venv/bin/pip-audit" --no-deps --disable-pip --progress-spinner off --format json \
    --requirement "$root/clusters/constraints.txt" >"$folder/found" 2>"$folder/why" || true
"$python" - "$folder/found" "$accepted" <<'PYTHON' || { status=$?; [ "$status" -eq 2 ] || exit "$status"; tail -n 1 "$folder/why"; }
import json
import sys

try:
    packages = json.load(open(sys.argv[1]))["dependencies"]
except ValueError:
    print("audit: not done, the advisory database did not answer:")
    sys.exit(2)
known = [package for package in packages if "vulns" in package]
found = [(package["name"], package["version"], flaw["id"]) for package in known for flaw in package["vulns"]
         if flaw["id"] not in sys.argv[2].split()]
print(f"audit: {len(known)} of {len(packages)} packages were found in the advisory database, {len(found)} vulnerabilities are known")
for line in found:
    print("audit:", *line)
sys.exit(bool(found))
PYTHON
