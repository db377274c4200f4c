"""A set as .pt files. That takes torch, which pages do not: another process writes them."""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
import threading
import zipfile
from pathlib import Path

from krrst_dist.artifacts import ArtifactError

LONGEST = 300.0
"""seconds for it; torch alone takes some"""
_ALONE = threading.Lock()


def as_pt(uri: str) -> bytes:
    """What `krrst export --format pt` writes, as a .zip; one at a time. Raises ArtifactError with what it said where it could not."""
    if not _ALONE.acquire(blocking=False):
        raise ArtifactError("another export to .pt is being written; try again when it is done")
    try:
        return _zipped(uri)
    finally:
        _ALONE.release()


def _zipped(uri: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-P", "-m", "krrst_dist.cli", "export", uri, folder, "--format", "pt"]  # -P: nothing of this folder runs
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST)
        except subprocess.TimeoutExpired:
            raise ArtifactError(f"writing .pt files took longer than {LONGEST:g} s; use krrst export {uri} FOLDER --format pt") from None
        if ran.returncode:
            raise ArtifactError(f"no .pt files could be written: {ran.stderr.strip()}")
        sink = io.BytesIO()
        with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as file:
            for path in sorted(Path(folder).iterdir()):
                file.write(path, path.name)
        return sink.getvalue()
