"""Recipes from YAML files and from `a.b=c` assignments, laid over each other."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from resect.errors import UsageError, nearest, shown
from resect.explain import explain
from resect.recipe.schema import EvaluationSection, Recipe, overlaid

INTEGER, DECIMAL = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
LARGEST = 1 << 20
"""Bytes of a recipe."""
DEEPEST = 32
"""Lists and mappings inside each other."""
MOST = 20_000
"""Values of a recipe, those under an alias counted where it stands."""
TRUST = "trust_remote_code"


class _Loader(yaml.SafeLoader):
    """YAML with the numbers of its version 1.2: 2:4 is text, not minutes and seconds, and 1e-4 a number."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag not in (INTEGER, DECIMAL)]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """A value; depth and number of values are counted on the way, so that no alias multiplies them without end."""
        self._depth += 1
        if self._depth > DEEPEST:
            raise yaml.YAMLError(f"lists and mappings are nested more than {DEEPEST} deep")
        alias = self.check_event(yaml.AliasEvent)
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None and not alias:
            self._sizes[id(node)] = self._size(node)
        if alias and id(node) not in self._sizes:
            raise yaml.YAMLError("an alias stands inside of what it names")
        return node

    def _size(self, node: yaml.Node) -> int:
        """The values in a node, itself among them."""
        if isinstance(node, yaml.ScalarNode):
            return 1
        if isinstance(node, yaml.MappingNode):
            _check_distinct(node)
        inside = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        size = 1 + sum(self._sizes[id(part)] for part in inside)
        if size > MOST:
            raise yaml.YAMLError(f"it holds more than {MOST:,} values, those under aliases counted")
        return size


def _check_distinct(node: yaml.MappingNode) -> None:
    """Refuses a key that stands twice in one mapping: either value may be meant."""
    keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise yaml.YAMLError(f"the key {shown(twice[0])} stands there twice")


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

    Code that comes with a model is only run where `values` or an assignment say `trust_remote_code`: a file may be a stranger's.
    Raises `UsageError` for a missing or malformed file, for unknown keys and values, naming the nearest valid one, and for a
    file that alone asks for such code.
    """
    own = laid_over(values or {}, assignments)
    recipe = Recipe.from_mapping(overlaid(read_values(path), own) if path is not None else own)
    check_trust(recipe.trust_remote_code, own, path)
    return recipe


def laid_over(values: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Values under assignments."""
    found = dict(values)
    for assignment in assignments:
        found = overlaid(found, assigned(assignment))
    return found


def check_trust(trusted: bool, own: Mapping[str, Any], path: str | Path | None) -> None:
    """`UsageError` where a file is the only one to say that a model's code may run; `own` is what its reader says."""
    if trusted and TRUST not in own:
        raise UsageError(
            f"The recipe {shown(str(path))} says {TRUST}: true: code of its models would be run. That is for "
            "whoever runs a recipe to say: read the code, then give --trust-remote-code "
            "(in Python: values={'trust_remote_code': True})."
        )


def evaluation_section(values: Mapping[str, Any], *, assignments: Iterable[str] = ()) -> EvaluationSection:
    """What to measure, from values and assignments like `latency.prompt=128`; `UsageError` for what does not fit."""
    try:
        return EvaluationSection.model_validate(laid_over(values, assignments))
    except ValidationError as problem:
        raise UsageError(explain(problem, EvaluationSection)) from problem


def read_values(path: str | Path) -> dict[str, Any]:
    """What a YAML file says, not checked yet."""
    name = shown(str(path))
    try:
        file = Path(path).expanduser()
        if file.exists() and not file.is_file():
            raise UsageError(f"The recipe {name} is a directory, a pipe or a device. Name a YAML file.")
        if not file.is_file():
            raise UsageError(f"There is no recipe {name}. {_beside(file)}".rstrip())
        with file.open("rb") as stream:
            data = stream.read(LARGEST + 1)
    except (OSError, ValueError, RuntimeError) as problem:
        if isinstance(problem, UsageError):
            raise
        said = problem.strerror if isinstance(problem, OSError) else problem
        raise UsageError(f"The recipe {name} cannot be read: {said}. Name a YAML file.") from problem
    if len(data) > LARGEST:
        raise UsageError(f"The recipe {name} has more than {LARGEST:,} bytes. Name a YAML file like those in run directories.")
    try:
        values = parsed(data.decode("utf-8-sig"))
    except ValueError as problem:
        raise UsageError(f"The recipe {name} is not YAML: {problem}.") from problem
    if not isinstance(values, dict):
        raise UsageError(f"The recipe {name} holds {_what(values)}; a mapping was expected: `model: demo` and so on.")
    return {str(key): value for key, value in values.items()}


def parsed(text: str) -> Any:
    """The values of a YAML text; `ValueError` for whatever is wrong with it, which is found before anything is multiplied."""
    try:
        return yaml.load(text, _Loader)
    except AttributeError as problem:  # PyYAML takes apart what it has not looked at: `!!timestamp x`
        raise ValueError("a value does not fit its tag") from problem
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as problem:
        raise ValueError(" ".join(str(problem).split())[:400].rstrip(".")) from problem


def assigned(assignment: str) -> dict[str, Any]:
    """The nested values of `a.b=c`; `c` is read as YAML: numbers, lists, true, null."""
    place, equals, text = assignment.partition("=")
    keys = place.strip().split(".")
    if not equals or not all(keys):
        raise UsageError(f"--set {shown(assignment)} was given; it is written place=value, like settings.criterion=l2.")
    try:
        value = parsed(text)
    except ValueError as problem:
        raise UsageError(
            f"--set {shown(assignment)}: {shown(text)} is not YAML. Quote it, like {shown(place)[1:-1]}='\"...\"'."
        ) from problem
    for key in reversed(keys):
        value = {key: value}
    return dict(value)


def _beside(file: Path) -> str:
    """The nearest YAML file in the directory of a missing one."""
    if not file.parent.is_dir():
        return f"There is no directory {file.parent}."
    known = [str(other) for other in sorted(file.parent.iterdir()) if other.suffix in (".yaml", ".yml")]
    return nearest(str(file), known) if known else ""


def _what(values: Any) -> str:
    return "nothing" if values is None else f"a {type(values).__name__}"
