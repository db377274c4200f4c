#!/usr/bin/env bash
# From a fresh machine to a distilled set: set-up, then the main job on real handwritten digits on a one-machine Ray
# cluster, by the very path a cluster user takes. Further arguments go to the job (`--seed 1`, `--out DIR`).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${KRRST_VENV:-$root/.venv}

bash "$root/clusters/setup_node.sh"
set_up=$SECONDS
"$venv/bin/krrst" submit --preset quickstart --resume "$@"
echo
echo "quickstart: set-up $set_up s, job $((SECONDS - set_up)) s"
echo "next, on real CIFAR-100, probed on CIFAR-10 too (DIR holds cifar100-train.parquet, cifar100-test.parquet, cifar10-train.parquet and"
echo "cifar10-test.parquet, or torchvision's files of both):"
echo "    $venv/bin/krrst submit --preset cifar100-cpu --data DIR"
