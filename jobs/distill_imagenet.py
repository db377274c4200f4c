"""The main job: prepare -> self-supervised target -> distil -> evaluate, on the cluster it is submitted to.

    ray job submit --working-dir . -- python jobs/distill_imagenet.py --data /data --out s3://bucket/run
    python jobs/distill_imagenet.py --preset cifar100-cpu --data ../shared/data      # on this machine

Without --preset: ImageNet at 64 px, as published. --help lists every setting.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from krrst_dist import cli, provenance  # noqa: E402


def main() -> int:
    return cli.guarded(lambda: provenance.verify_uploaded_code(ROOT)) or cli.main(["evaluate", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
