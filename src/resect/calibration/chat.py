"""Conversations as text, by a tokenizer's own chat template: a program that a stranger wrote."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from resect.errors import ModelError

LARGEST = 10_000_000
"""Characters of a conversation as a template may write it out."""
MEMORY = 1 << 30
"""Bytes that a template may take while it writes one."""
SECONDS = 30
"""How long a template may take for one conversation."""


def chat_text(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """The text of a conversation in the tokenizer's chat template. Raises `ModelError` with what the template says."""
    try:
        with _limited(), _within_memory():
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    except MemoryError as problem:
        raise ModelError(
            f"The tokenizer's chat template wanted more than {MEMORY >> 20} MiB for a conversation of "
            f"{len(messages)} message(s), or there is no more. Use another template."
        ) from problem
    except Exception as problem:  # templates raise what they like
        said = " ".join(str(problem).split())[:300] or type(problem).__name__
        raise ModelError(
            f"The tokenizer's chat template refused a conversation of {len(messages)} message(s): {said}"
        ) from problem
    if not isinstance(text, str) or len(text) > LARGEST:
        raise ModelError(f"The tokenizer's chat template wrote no text of at most {LARGEST:,} characters.")
    return text


@contextmanager
def _within_memory() -> Iterator[None]:
    """No more than `MEMORY` beyond what the process has already, where the system can say and limit that (Linux)."""
    try:
        import resource

        with open("/proc/self/statm", "rb") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    least = [limit for limit in (soft, hard, taken + MEMORY) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(least), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def _limited() -> Iterator[None]:
    """Ends what runs too long, where it runs in the main thread and nobody else waits for an alarm."""
    free = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    if not free or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"it did not end within {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
