"""Locks that keep two live processes from writing one place. They die with the process, also with one that is killed."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # no POSIX
    fcntl = None


def is_held(path: str | os.PathLike) -> bool:
    """Whether a live process holds the lock file at `path`; False where there is none, or no locks. Nothing is created."""
    if fcntl is None or not Path(path).exists():
        return False
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # the file system has no locks
    finally:
        os.close(descriptor)
    return False


@contextlib.contextmanager
def exclusive_lock(path: str | os.PathLike, purpose: str) -> Iterator[None]:
    """Hold the lock file at `path` while the context is open; the system releases it when the process dies.

    Raises ValueError naming `purpose` where another process holds it. File systems without locks are not protected.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"{purpose} is already running: another process holds {path}. Wait for it or stop it. Where one command "
                    "was to start several processes, they know nothing of each other; see `accelerate launch --multi_gpu`"
                ) from None
            except OSError:
                pass  # the file system has no locks
        yield
    finally:
        os.close(descriptor)
