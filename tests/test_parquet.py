"""krrst_dist.parquet: tables to bytes and back."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from krrst_dist import parquet

TABLE = pa.table({"name": ["a", "b", None], "value": [0.1, None, -0.0]}).replace_schema_metadata({"about": "three rows"})


def test_a_table_comes_back_as_it_was():
    assert parquet.decode(parquet.encode(TABLE)).equals(TABLE, check_metadata=True)


def test_a_flipped_bit_of_the_data_is_noticed():
    payload = bytearray(parquet.encode(pa.table({"value": np.random.default_rng(0).random(1000)})))
    payload[len(payload) // 2] ^= 1
    with pytest.raises((OSError, pa.ArrowException)):
        parquet.decode(bytes(payload))


def test_neither_way_starts_a_thread_that_could_abort_a_process_that_ends():
    script = """
import os
import pyarrow as pa
from krrst_dist import parquet

table = pa.table({f"c{i}": [f"{i} {j}" for j in range(50)] for i in range(30)})
before = set(os.listdir("/proc/self/task"))
assert parquet.decode(parquet.encode(table)).equals(table)
print(sorted(set(os.listdir("/proc/self/task")) - before))
"""
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"
