"""Files as they are read, written, locked and gone on with; the only room that touches a disk on its own account.

`resect.files.progress` is imported by name: torch comes with it, and the command line starts without.
"""

from resect.files.outputs import beside, claimed
from resect.files.reading import parse_json, plain_json, read_json, read_text, reading
from resect.files.writing import (
    begins,
    check_directory,
    check_file,
    claimed_directory,
    claimed_file,
    temporary_folder,
    whole_directory,
    whole_file,
    write_text,
)

__all__ = [
    "begins",
    "beside",
    "check_directory",
    "check_file",
    "claimed",
    "claimed_directory",
    "claimed_file",
    "parse_json",
    "plain_json",
    "read_json",
    "read_text",
    "reading",
    "temporary_folder",
    "whole_directory",
    "whole_file",
    "write_text",
]
