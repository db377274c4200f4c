"""`python -m krrst_dist.explorer URI`: as `krrst explore URI`."""

import sys

from krrst_dist.explorer.explore import explore_main

try:
    explore_main(sys.argv[1:])
except ValueError as error:  # what a user can mend
    sys.exit(f"error: {error}")
