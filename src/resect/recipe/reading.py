"""Recipes from YAML files and from `a.b=c` assignments, laid over each other."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from resect.errors import UsageError, nearest
from resect.explain import explain
from resect.recipe.schema import EvaluationSection, Recipe, overlaid

INTEGER, DECIMAL = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"


class _Loader(yaml.SafeLoader):
    """YAML with the numbers of its version 1.2: 2:4 is text, not minutes and seconds, and 1e-4 a number."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag not in (INTEGER, DECIMAL)]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(INTEGER, re.compile(r"[-+]?(0|[1-9][0-9_]*)$|0x[0-9a-fA-F]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    DECIMAL,
    re.compile(r"[-+]?([0-9]*\.[0-9]+|[0-9]+\.|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"),
    list("-+.0123456789"),
)


def read_recipe(
    path: str | Path | None = None, values: Mapping[str, Any] | None = None, *, assignments: Iterable[str] = ()
) -> Recipe:
    """The recipe in a YAML file, under `values`, under assignments like `settings.criterion=l2`.

    Raises `UsageError` for a missing or malformed file and for unknown keys and values, naming the nearest valid one.
    """
    found = read_values(path) if path is not None else {}
    found = overlaid(found, values or {})
    for assignment in assignments:
        found = overlaid(found, assigned(assignment))
    return Recipe.from_mapping(found)


def evaluation_section(values: Mapping[str, Any], *, assignments: Iterable[str] = ()) -> EvaluationSection:
    """What to measure, from values and assignments like `latency.prompt=128`; `UsageError` for what does not fit."""
    found = dict(values)
    for assignment in assignments:
        found = overlaid(found, assigned(assignment))
    try:
        return EvaluationSection.model_validate(found)
    except ValidationError as problem:
        raise UsageError(explain(problem, EvaluationSection)) from problem


def read_values(path: str | Path) -> dict[str, Any]:
    """What a YAML file says, not checked yet."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UsageError(f"There is no recipe {str(path)!r}. {_beside(file)}".rstrip())
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        said = " ".join(str(problem).split())
        raise UsageError(f"The recipe {path} is not YAML: {said}.") from problem
    if not isinstance(values, dict):
        raise UsageError(f"The recipe {path} holds {_what(values)}; a mapping was expected: `model: demo` and so on.")
    return {str(key): value for key, value in values.items()}


def assigned(assignment: str) -> dict[str, Any]:
    """The nested values of `a.b=c`; `c` is read as YAML: numbers, lists, true, null."""
    place, equals, text = assignment.partition("=")
    keys = place.strip().split(".")
    if not equals or not all(keys):
        raise UsageError(f"--set {assignment!r} was given; it is written place=value, like settings.criterion=l2.")
    try:
        value: Any = yaml.load(text, _Loader)
    except yaml.YAMLError as problem:
        raise UsageError(f"--set {assignment!r}: {text!r} is not YAML. Quote it, like {place}='\"...\"'.") from problem
    for key in reversed(keys):
        value = {key: value}
    return dict(value)


def _beside(file: Path) -> str:
    """The nearest YAML file in the directory of a missing one."""
    if not file.parent.is_dir():
        return f"There is no directory {file.parent}."
    known = [str(other) for other in file.parent.iterdir() if other.suffix in (".yaml", ".yml")]
    return nearest(str(file), known) if known else ""


def _what(values: Any) -> str:
    return "nothing" if values is None else f"a {type(values).__name__}"
