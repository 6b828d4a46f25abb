"""One owner at a time for the GPUs of a machine: who holds them, and until when, stands beside the lock.

The lock is the system's own and goes back when its holder dies, so a stale note means a holder that was killed: the
lock is taken over, and that is said. A holder that is alive past its deadline is not pushed aside, it is named.
"""

import contextlib
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from filelock import FileLock, Timeout

FOLDER = Path(tempfile.gettempdir())
NAME = "draftproof-gpu.lock"


class Busy(OSError):
    """Somebody else holds the GPUs; the message names who, and until when."""


@dataclass(frozen=True)
class Owner:
    """Who holds the lock."""

    owner: str
    pid: int
    host: str
    since: str
    """UTC, ISO 8601"""
    deadline: str

    @property
    def is_late(self) -> bool:
        """Past its own deadline."""
        return datetime.fromisoformat(self.deadline) < datetime.now(UTC)

    def __str__(self) -> str:
        return f"{self.owner} (pid {self.pid} on {self.host}, since {self.since}, until {self.deadline})"


class Held:
    """The lock while it is ours; `taken_over` names the dead owner whose note was found."""

    def __init__(self, owner: Owner, taken_over: Owner | None) -> None:
        self.owner, self.taken_over = owner, taken_over

    @property
    def is_late(self) -> bool:
        """Nothing new is begun past the deadline that others were told."""
        return self.owner.is_late


@contextlib.contextmanager
def hold(hours: float, wait_s: float = 0.0, folder: Path = FOLDER) -> Iterator[Held]:
    """The lock for a block; Busy after `wait_s` seconds of waiting for somebody who is alive."""
    folder.mkdir(parents=True, exist_ok=True)
    lock, note = FileLock(folder / NAME, mode=0o666), folder / f"{NAME}.owner.json"
    try:
        lock.acquire(timeout=wait_s)
    except Timeout as busy:
        holder = noted(note)
        late = ", which is over; if it hangs, end it" if holder and holder.is_late else ""
        raise Busy(f"the GPUs are held by {holder or 'somebody who left no note'}{late}") from busy
    try:
        left = noted(note)
        now = datetime.now(UTC)
        stamps = (one.isoformat(timespec="seconds") for one in (now, now + timedelta(hours=hours)))
        owner = Owner(os.environ.get("USER") or f"uid {os.getuid()}", os.getpid(), socket.gethostname(), *stamps)
        # whole or not at all, for those who read while they wait
        draft = note.with_suffix(".new")
        draft.write_text(json.dumps(asdict(owner)), encoding="utf-8")
        os.replace(draft, note)
        yield Held(owner, left)
    finally:
        note.unlink(missing_ok=True)
        lock.release()


def noted(note: Path) -> Owner | None:
    """What the last holder wrote; None where there is nothing to read."""
    try:
        return Owner(**json.loads(note.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
