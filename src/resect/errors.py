"""The errors that resect raises: each says what was asked, what was found, and what to do. And its warnings."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ResectError(Exception):
    """Anything a user can cause; the command line prints it without a traceback."""


class UsageError(ResectError, ValueError):
    """A request that cannot be met: unknown names, shares outside (0, 1], budgets out of reach."""


class ModelError(ResectError):
    """A model that cannot be traced, cut or loaded.

    `groups` names coupled groups without which it may work: those around the code that did not take their new sizes.
    """

    def __init__(self, message: str, groups: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.groups = tuple(groups)


class DataError(ResectError):
    """Text that is missing, empty or too short."""


class NumericsError(ResectError):
    """NaN or infinity where a number was expected; the message names the tensor."""


class CheckpointError(ResectError):
    """A directory that cannot be read or written."""


class ResectWarning(UserWarning):
    """Something that a user should know; the command line prints it as a line of its own."""


class FewPositions(ResectWarning):
    """Calibration data shows a layer fewer positions than it has inputs."""


class DampingRaised(ResectWarning):
    """A factor of curvature could not be inverted with the damping that was asked for."""


class OtherMachine(ResectWarning):
    """Something was measured on another machine than this one."""


class EmulatedPrecision(ResectWarning):
    """What is computed in has no instructions on this processor, and takes far longer than float32."""


class SecondTermClipped(ResectWarning):
    """The second Kronecker term of a curvature took more from the first than can be, and was clipped."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A sentence that names the closest known word, or lists them all when none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(names)}."
