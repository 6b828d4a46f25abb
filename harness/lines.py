"""A file of lines that is only ever appended to, by writers of several processes, any of which may be killed.

A line is acknowledged when `append` returns. One `write` puts it at the end of the file (O_APPEND), under a lock that
the system takes back from a process that dies. A kill in the middle of a write leaves a piece without its end; whoever
writes next, under the same lock, closes the piece with TORN first, so that no line ever grows out of two writers.
"""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

# closes a line that a killed process left behind; no JSON object can end like this
TORN = "#torn"


class Lines:
    """One writer of the file; each process, and each thread, opens its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: int | None = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)

    def append(self, line: str) -> None:
        """Write one line; it is in the file, whole, when this returns."""
        if self._file is None:
            raise ValueError(f"{self.path}: closed")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            data = f"{self._closing()}{line}\n".encode()
            if os.write(self._file, data) != len(data):
                raise OSError(f"{self.path}: a line was not written whole; is the disk full?")
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        """Put the file on the disk; closing twice is harmless."""
        if self._file is not None:
            os.fsync(self._file)
            os.close(self._file)
            self._file = None

    def _closing(self) -> str:
        """What ends the piece that a killed writer left; empty after a whole line."""
        assert self._file is not None
        size = os.fstat(self._file).st_size
        return f"{TORN}\n" if size and os.pread(self._file, 1, size - 1) != b"\n" else ""


def whole(text: str) -> Iterator[tuple[int, str, bool]]:
    """(number, line, whether it has its end) of every line that may hold something; closed pieces are left out."""
    *lines, last = text.split("\n")
    yield from ((number, line, True) for number, line in enumerate(lines, 1) if line and not line.endswith(TORN))
    if last:
        yield len(lines) + 1, last, False
