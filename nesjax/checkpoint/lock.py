"""The lock that a folder's one writer holds while it runs.

It is the operating system's, so it ends with a process that is killed. Where a file system doesn't carry locks from one
machine to another, the file's text, which the writer renews, serves as a lease.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import socket
import time
import weakref
from typing import TextIO

held: weakref.WeakSet[Lock] = weakref.WeakSet()  # by this process
os.register_at_fork(after_in_child=lambda: [lock.forget() for lock in held])
LEASE = 600  # seconds for which a writer on another machine counts as alive after it last renewed its lease
RENEW = 60  # seconds between renewals


class Lock:
    """The lock of `path`, held until `release`.

    Args:
      path: the lock file, created if missing.
      take_over: the holder, "host:pid", whose lease is taken over because it no longer runs.

    Raises:
      ValueError: another writer holds the lock; the message says who.
    """

    def __init__(self, path: pathlib.Path, take_over: str | None = None) -> None:
        self.path, self.me = path, f"{socket.gethostname()}:{os.getpid()}"
        self._file: TextIO = path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._refuse(self._holder())
        except OSError:  # a file system without locks: the lease alone
            pass
        holder = self._holder()
        elsewhere = holder and holder.rpartition(":")[0] != self.me.rpartition(":")[0]
        if elsewhere and holder != take_over and time.time() - path.stat().st_mtime < LEASE:
            self._refuse(holder)
        self._write(self.me)
        held.add(self)

    def forget(self) -> None:
        """Closes the file without giving the lock back, in a process forked from its writer, which would keep it."""
        self._file.close()

    def _refuse(self, holder: str) -> None:
        self._file.close()
        raise ValueError(
            f"folder must have no other writer, but {holder or 'another process'} writes in {self.path.parent}: "
            f'end it or use another folder. If it ran on another machine and is dead, pass take_over="{holder}".'
        )

    def _holder(self) -> str:
        self._file.seek(0)
        return self._file.read().strip()

    def _write(self, text: str) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._file.write(text)
        self._file.flush()
        self._renewed = time.monotonic()

    def renew(self) -> None:
        """Records that the writer is alive, once every `RENEW` seconds.

        Raises:
          OSError: another writer took over.
        """
        if time.monotonic() - self._renewed > RENEW:
            holder = self._holder()
            if holder != self.me:
                raise OSError(f"{holder or 'another process'} took over {self.path.parent}")
            self._write(self.me)

    def release(self) -> None:
        if not self._file.closed:  # as in a forked process
            with contextlib.suppress(OSError):
                if self._holder() == self.me:
                    self._write("")
            self._file.close()
