"""The evaluation grid: distilled sets x architectures x targets x tasks x seeds, on the cluster it is submitted to.

    ray job submit --working-dir . -- python jobs/transfer_grid.py --grid table3 --data /data --out s3://bucket/table3
    python jobs/transfer_grid.py --grid cifar100-cpu --data ../shared/data      # on this machine

`--grid NAME --help` lists every setting.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from krrst_dist import cli, provenance  # noqa: E402


def main() -> int:
    return cli.guarded(lambda: provenance.verify_uploaded_code(ROOT)) or cli.main(["grid", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
