"""The command line: every command reads its words and makes one library call."""

from resect.cli.commands import app

__all__ = ["app"]
