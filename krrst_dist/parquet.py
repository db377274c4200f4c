"""Tables to bytes in Parquet format and back. Knows nothing of what the tables mean nor of where the bytes lie.

Bytes of Python's are read in one thread: with more, Arrow's threads let go of the last piece of them, for which they
need the interpreter, and if it is just ending then the process aborts ("terminate called without an active exception").
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq


def encode(table: pa.Table) -> bytes:
    """A Parquet file's bytes, compressed, with checksums."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue().to_pybytes()


LARGEST = 2_000_000_000
"""bytes that a table may take in memory: a million results take a half"""
_ROWS = 4096  # that are decoded at once: a value that is repeated takes no space in a file, and much in memory


def decode(payload: bytes) -> pa.Table:
    """The table in a Parquet file's bytes.

    Raises pa.ArrowException, OSError or ValueError when they are damaged or not Parquet, ValueError for a table larger than LARGEST, of
    which no more than that is decoded.
    """
    file = pq.ParquetFile(pa.BufferReader(payload), page_checksum_verification=True)
    groups = range(file.metadata.num_row_groups)
    _require_bearable(sum(file.metadata.row_group(i).total_byte_size for i in groups))
    batches, size = [], 0
    for batch in file.iter_batches(_ROWS, use_threads=False):
        _require_bearable(size := size + batch.nbytes)
        batches.append(batch)
    if (rows := sum(batch.num_rows for batch in batches)) != file.metadata.num_rows:
        raise ValueError(f"{rows} rows where its metadata say {file.metadata.num_rows}")
    return pa.Table.from_batches(batches, schema=file.schema_arrow)


def _require_bearable(size: int) -> None:
    if size > LARGEST:
        raise ValueError(f"the table is larger than {LARGEST / 1e9:g} GB in memory, though the file is small: it is no table of ours")
