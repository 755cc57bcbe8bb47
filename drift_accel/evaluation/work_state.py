"""What long work is at, in a file that others may read at any time: waiting, running X, done, failed: why."""

import os
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from drift_accel.foundation.collectives import SharedWorkError
from drift_accel.foundation.storage import atomic_write_json

WAITING, DONE = "waiting", "done"


class WorkState:
    """FILE: {"now", "stages": {name: "waiting" | "running" | "done" | "failed: why"}, "pid", "updated"}.

    Nothing is read from it: what is done is told by the results that exist, so that the file can be removed at any time.
    With `enabled` False nothing is written: of several processes only one enables it.
    """

    def __init__(self, path: str | os.PathLike, stages: tuple[str, ...] = (), *, enabled: bool = True):
        self.path, self.enabled = Path(path), enabled
        self.now, self.stages = WAITING, dict.fromkeys(stages, WAITING)
        self.write()

    def wait(self, what: str = "") -> None:
        """Nothing can be done at the moment; `what` says for what."""
        now = f"{WAITING} {what}".strip()
        if now != self.now:
            self.now = now
            self.write()

    def run(self, name: str, work: Callable[[], Any]) -> bool:
        """Do one stage and note how it ended; returns whether it was well. A failure is noted, not raised."""
        self.now, self.stages[name] = f"running {name}", "running"
        self.write()
        try:
            work()
        except (ValueError, OSError, RuntimeError) as error:
            kind = "" if isinstance(error, SharedWorkError) else f"{type(error).__name__}: "  # its text names process and class
            self.stages[name] = f"failed: {kind}{' '.join(str(error).split())}"
            self.now = f"failed: {name}"
            self.write()
            return False
        self.stages[name] = DONE
        self.write()
        return True

    def skip(self, name: str) -> None:
        """A stage whose result is there already."""
        if self.stages.get(name) != DONE:
            self.stages[name] = DONE
            self.write()

    def finish(self) -> bool:
        """Note the end; returns whether every stage was well."""
        failed = [name for name, state in self.stages.items() if state != DONE]
        self.now = f"failed: {', '.join(failed)}" if failed else DONE
        self.write()
        return not failed

    def write(self) -> None:
        """Replace the file."""
        if self.enabled:
            updated = datetime.now(timezone.utc).isoformat(timespec="seconds")
            atomic_write_json(self.path, {"now": self.now, "stages": self.stages, "pid": os.getpid(), "updated": updated})
