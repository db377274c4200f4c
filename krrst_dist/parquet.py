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


def decode(payload: bytes) -> pa.Table:
    """The table in a Parquet file's bytes. Raises pa.ArrowException, OSError or ValueError when they are damaged or not Parquet."""
    return pq.ParquetFile(pa.BufferReader(payload), page_checksum_verification=True).read(use_threads=False)
