"""The lower bounds of pyproject.toml as pip constraints: `python tests/lowest.py test onnx > FILE`.

Without arguments the bounds of the dependencies alone, with names those of the extras too. Needs
Python alone, so that it runs before anything is installed.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def requirements(extras: Iterable[str] = ()) -> list[str]:
    """What pyproject.toml requires, with the extras that are named, but for resect's own extras."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][name] for name in extras)]
    return [line for lines in lists for line in lines if not line.startswith("resect[")]


def lowest(requirement: str) -> str:
    """`name[extra]>=1.2` as the constraint `name==1.2`; raises ValueError where there is no such bound."""
    name, separator, bound = requirement.partition(">=")
    if not separator or not bound or not set(bound) <= set("0123456789."):
        raise ValueError(f"{requirement!r} in pyproject.toml has no plain lower bound, NAME>=VERSION.")
    return f"{name.partition('[')[0]}=={bound}"


if __name__ == "__main__":
    print("\n".join(lowest(requirement) for requirement in requirements(sys.argv[1:])))
