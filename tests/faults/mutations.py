"""Files damaged at random, and on purpose: bits, lengths, regions, pages; and values that no reader should take as they are."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Change = Callable[[bytes, random.Random], bytes]
PAGE = 64
"""Bytes that are lost at once; a real page is larger than most of these files."""
DEEP = 20_000
"""Brackets within brackets; parsers that call themselves end at a thousand."""


@dataclass(frozen=True)
class Literal:
    """A piece of JSON, as it stands in the file: not all of them can be said by Python's values."""

    text: str


HOSTILE: Sequence[Any] = (  # no numbers, out of range, of another type, deep, long, paths, escapes
    Literal("NaN"), Literal("-Infinity"), Literal("1e400"), -1, 0, 10**30, -(10**30), 2**31, 2**63, 0.5, 1e-320,
    None, True, False, "", "0", [], {}, [[]], {"a": {}}, [None], "\x00",
    Literal('"\\ud800"'), "../../../etc/passwd", "/etc/passwd",
    "file:///etc/passwd", "\x1b[2J\x1b]0;owned\x07", "\u202e", "x" * 20_000, "{{ 7 * 7 }}", "__class__", "__import__('os')",
    Literal("[" * DEEP + "]" * DEEP), Literal("1" * 5_000),
)  # fmt: skip
"""Values in the place of others: no numbers, out of range, of another type, deep, long, half an emoji, paths, escapes."""


@dataclass(frozen=True)
class Mutation:
    """A damaged file."""

    what: str
    data: bytes


def mutations(data: bytes, form: str, *, count: int, seed: int) -> Iterator[Mutation]:
    """So many damaged copies of a file of this form, no two alike, the same for the same seed."""
    chance, seen = random.Random(f"{seed}:{form}:{len(data)}"), {data}
    kinds = [*BYTES.items(), *(FORMS.get(form, {}).items() if _whole(data, form) else ())]
    for number in range(20 * count):
        name, change = kinds[number % len(kinds)]
        changed = change(data, chance)
        if changed not in seen:
            seen.add(changed)
            yield Mutation(name, changed)
            if len(seen) > count:
                return


def _whole(data: bytes, form: str) -> bool:
    """Whether a file has the form that its name says; what was cut off in a crash has not."""
    try:
        return form != "json" or json.loads(data) is not ...
    except ValueError:
        return False


def _bit(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(max(1, len(data)))
    return (
        data[:at] + bytes([(data[at] if data else 0) ^ 1 << chance.randrange(8)]) + data[at + 1 :]
    )


def _cut(data: bytes, chance: random.Random) -> bytes:
    return data[
        : chance.choice(
            [0, 1, len(data) // 2, max(0, len(data) - 1), chance.randrange(max(1, len(data)))]
        )
    ]


def _swap(data: bytes, chance: random.Random) -> bytes:
    size = max(1, min(PAGE, len(data) // 4))
    first, second = sorted(chance.sample(range(max(2, len(data) // size)), 2))
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    if second < len(pieces):
        pieces[first], pieces[second] = pieces[second], pieces[first]
    return b"".join(pieces)


def _zeroed(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(max(1, len(data))) // PAGE * PAGE
    return data[:at] + bytes(min(PAGE, len(data) - at)) + data[at + PAGE :]


def _doubled(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(max(1, len(data)))
    return data[:at] + data[at : at + PAGE] + data[at:]


def _noise(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(max(1, len(data)))
    return data[:at] + chance.randbytes(4) + data[at + 4 :]


def _nothing_but_zeros(data: bytes, chance: random.Random) -> bytes:
    return bytes(len(data))


def _value(data: bytes, chance: random.Random) -> bytes:
    """One value of a JSON document replaced by a hostile one."""
    return dumped(_with(json.loads(data), chance)).encode("utf-8", "surrogatepass")


def _missing(data: bytes, chance: random.Random) -> bytes:
    """One entry of a JSON document taken out, or named otherwise."""
    document = json.loads(data)
    places = [(holder, key) for holder, key in _places(document) if isinstance(holder, dict)]
    if not places:
        return data
    holder, key = chance.choice(places)
    value = holder.pop(key)
    if chance.random() < 0.3:
        holder[f"{key}\x00"] = value
    return json.dumps(document).encode()


def _row(data: bytes, chance: random.Random) -> bytes:
    """One line of JSONL with a hostile value."""
    lines = data.decode().splitlines()
    at = chance.randrange(len(lines))
    lines[at] = dumped(_with(json.loads(lines[at]), chance))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _yaml(data: bytes, chance: random.Random) -> bytes:
    """A recipe with one hostile value."""
    import yaml

    return dumped(_with(yaml.safe_load(data), chance)).encode(
        "utf-8", "surrogatepass"
    )  # JSON is YAML


def _yaml_tag(data: bytes, chance: random.Random) -> bytes:
    """A recipe that asks for more than data."""
    bomb = "a0: &a0 [x, x]\n" + "".join(
        f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)
    )
    added = [
        'evil: !!python/object/apply:os.system ["touch /tmp/owned"]\n',
        "evil: !!python/name:os.system\n",
        "evil: !!python/object/new:subprocess.Popen [[touch, /tmp/owned]]\n",
        bomb + "settings: *a39\n",
        "evil: &evil {again: *evil}\n",
        "? [a, b]\n: c\n",
        "<<: *nothing\n",
        "model: [\n",
        "--- \nmodel: other\n",
        f"evil: {'[' * DEEP}{']' * DEEP}\n",
        "evil: !!binary gICA\n",
        "evil: 2026-13-45\n",
        "evil: !!timestamp x\n",
    ]
    return data + b"\n" + chance.choice(added).encode()


def _header(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file with a hostile header."""
    (size,) = struct.unpack("<Q", data[:8])
    if chance.random() < 0.25:
        return (
            struct.pack(
                "<Q", chance.choice([0, 1, size - 1, size + 1, len(data), 2**31, 2**63, 2**64 - 1])
            )
            + data[8:]
        )
    header = (
        _value(data[8 : 8 + size], chance)
        if chance.random() < 0.7
        else _missing(data[8 : 8 + size], chance)
    )
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def _gguf_header(data: bytes, chance: random.Random) -> bytes:
    """A GGUF whose first bytes, counts and lengths among them, are hostile."""
    at = chance.choice([0, 4, 8, 16, *(24 + 8 * chance.randrange(40) for _ in range(4))])
    value = chance.choice([0, 1, 2**31 - 1, 2**32, 2**63 - 1, 2**64 - 1])
    return data[:at] + struct.pack("<Q", value) + data[at + 8 :]


def _text(data: bytes, chance: random.Random) -> bytes:
    """Text with what no text should hold, or with next to nothing in it."""
    at = chance.randrange(len(data) + 1)
    piece = chance.choice(
        [
            b"\x00",
            b"\xff\xfe",
            b"\xed\xa0\x80",
            b"\xef\xbb\xbf",
            b"\x1b[2J",
            b"\r",
            b"\x0b\x0c",
            "\u2028\u202e".encode(),
            b"<s>",
        ]
    )
    return data[:at] + piece + data[at:]


def _jinja(data: bytes, chance: random.Random) -> bytes:
    """A chat template that does what no template should."""
    return chance.choice(
        [
            b"{{ 1 / 0 }}",
            b"{% for i in range(10 ** 9) %}{% for j in range(10 ** 9) %}x{% endfor %}{% endfor %}",
            b"{{ ''.__class__.__mro__[1].__subclasses__() }}",
            b"{{ cycler.__init__.__globals__.os.system('touch /tmp/owned') }}",
            b"{% include '/etc/passwd' %}",
            b"{{ raise_exception('no') }}",
            b"{{ messages[7].content }}",
            b"{% if %}",
            b"{{ 'x' * (10 ** 10) }}",
            b"{{ messages[0]['content'] | tojson | safe }}",
            b"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        ]
    )


BYTES: dict[str, Change] = {
    "a flipped bit": _bit,
    "cut short": _cut,
    "two regions swapped": _swap,
    "a page of zeros": _zeroed,
    "a region twice": _doubled,
    "noise": _noise,
    "nothing but zeros": _nothing_but_zeros,
}
FORMS: dict[str, dict[str, Change]] = {
    "json": {
        "a hostile value": _value,
        "another hostile value": _value,
        "one more hostile value": _value,
        "an entry less": _missing,
    },
    "jsonl": {"a hostile value": _row, "another hostile value": _row, "odd characters": _text},
    "yaml": {"a hostile value": _yaml, "another hostile value": _yaml, "tags, anchors": _yaml_tag},
    "safetensors": {"a hostile header": _header, "another hostile header": _header},
    "gguf": {"a hostile header": _gguf_header, "another hostile header": _gguf_header},
    "text": {"odd characters": _text},
    "jinja": {"a hostile template": _jinja, "another hostile template": _jinja},
}
"""What files of a form are damaged by besides."""


def dumped(document: Any) -> str:
    """JSON of a document that may hold literals."""
    literals: list[str] = []

    def plain(value: Any) -> Any:
        if isinstance(value, Literal):
            literals.append(value.text)
            return f"@literal {len(literals) - 1}@"
        if isinstance(value, dict):
            return {str(key): plain(below) for key, below in value.items()}
        return [plain(below) for below in value] if isinstance(value, list) else value

    text = json.dumps(plain(document), ensure_ascii=False)
    for number, literal in enumerate(literals):
        text = text.replace(f'"@literal {number}@"', literal)
    return text


def _with(document: Any, chance: random.Random) -> Any:
    """A document with one value replaced."""
    places = list(_places(document))
    value = chance.choice(HOSTILE)
    if not places:
        return value
    holder, key = chance.choice(places)
    holder[key] = value
    return document


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every value of a document, as what holds it and under which key; of long lists the first few."""
    if isinstance(document, dict):
        for key, value in document.items():
            yield document, key
            yield from _places(value)
    elif isinstance(document, list):
        for number, value in enumerate(document[:4]):
            yield document, number
            yield from _places(value)
