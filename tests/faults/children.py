"""A function in a forked child: all that is imported is there already, and whatever it does to the process is gone with it."""

from __future__ import annotations

import gc
import os
import pickle
import select
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

KILLED = 137
"""The exit code of a child that a shim ended; what a shell says of SIGKILL."""


@dataclass(frozen=True)
class Ended:
    """How a child ended."""

    how: str
    """`returned`, `killed` (by the shim), `raised`, `hung`, or `died` (of anything else)."""
    value: Any = None
    """What the function returned; of an exception its traceback as text, else what is known."""


def forked(
    function: Callable[[], Any], *, seconds: float = 60, meanwhile: Callable[[], None] | None = None
) -> Ended:
    """Calls `function` in a forked child that has so many seconds, and gives back what it returned; that is pickled.

    When the child stops itself (SIGSTOP), `meanwhile` is called here, and the child goes on.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _in_child(function, writing)
    os.close(writing)
    try:
        if meanwhile is not None and _stops(child, seconds):
            meanwhile()
            os.kill(child, signal.SIGCONT)
        data, in_time = _read(reading, seconds)
    finally:
        os.close(reading)
    if not in_time:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not in_time:
        return Ended("hung", f"no end after {seconds:g} s")
    code = os.waitstatus_to_exitcode(status)
    if code == KILLED:
        return Ended("killed")
    if code or not data:
        return Ended("died", f"exit code {code}")
    how, value = pickle.loads(data)
    return Ended(how, value)


def _in_child(function: Callable[[], Any], writing: int) -> None:
    """Never returns."""
    silent = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(silent, descriptor)
    gc.disable()  # it would write to all pages that are shared with the parent
    try:
        answer = ("returned", function())
    except BaseException:  # noqa: B036 - a child that goes on as its parent would be worse
        answer = ("raised", traceback.format_exc())
    with os.fdopen(writing, "wb") as pipe:
        pickle.dump(answer, pipe)
    os._exit(0)


def _stops(child: int, seconds: float) -> bool:
    """Waits for a child to stop itself; False when it ends instead, or takes too long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = os.waitid(os.P_PID, child, os.WSTOPPED | os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if found is not None:
            return found.si_code == os.CLD_STOPPED
        time.sleep(0.002)
    return False


def _read(reading: int, seconds: float) -> tuple[bytes, bool]:
    """All that comes until the end, and whether the end came in time."""
    end, found = time.monotonic() + seconds, list[bytes]()
    while (left := end - time.monotonic()) > 0:
        ready, _, _ = select.select([reading], [], [], left)
        if not ready:
            break
        piece = os.read(reading, 1 << 20)
        if not piece:
            return b"".join(found), True
        found.append(piece)
    return b"", False
