"""What can be wrong with data, so that every reader and writer says it in the same words.

Kept apart so that the modules that read betons and those that write them need not import one another.
"""

from __future__ import annotations


class DataError(ValueError):
    """Data that cannot be used: says which file, row or folder, what is wrong with it and what to do."""


class BadImage(DataError):
    """One image that cannot be decoded; `where` is its path, or its file and row."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: cannot be decoded ({reason})")
        self.where = where
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadImage], tuple[str, str]]:
        return BadImage, (self.where, self.reason)
