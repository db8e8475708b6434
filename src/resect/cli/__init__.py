"""The command line: every command reads its words and makes one library call."""

import sys

from resect.cli.answer import close
from resect.cli.commands import app

__all__ = ["app", "main"]


def main() -> None:
    """The program. What typer itself prints, help and usage, may have no place to go either."""
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except OSError as problem:
        close(sys.stdout)
        print(f"error: stdout cannot be written: {problem.strerror}.", file=sys.stderr)
        sys.exit(1)
