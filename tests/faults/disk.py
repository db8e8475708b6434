"""A model of a disk: what is in a folder, what of it is certain to be there after a power cut, and what may be there instead.

A file's content is certain once the file was fsynced; a name in a directory once the directory was. Until then a crash may leave
the old or the new of each, in any order. POSIX promises no more, and journalling file systems not much more.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Tree = Mapping[str, bytes | None]
"""Contents by path relative to the folder; None stands for a directory."""
RANDOM = re.compile(r"[0-9a-f]{8,32}|\d{2,}|(?<=[-_.])[a-z0-9_]{8}(?=$|[./])")
"""What differs in names from run to run: random hexadecimal numbers, process numbers, temporary names."""


@dataclass(eq=False)
class File:
    """A file: what reads give, and what is on the disk itself; None there: nothing yet."""

    content: bytes
    synced: bytes | None
    stamp: tuple[int, int]


@dataclass(eq=False)
class Directory:
    """A directory: its entries as they are, and as they are on the disk itself."""

    entries: dict[str, File | Directory] = field(default_factory=dict)
    synced: dict[str, File | Directory] = field(default_factory=dict)


Node = File | Directory
Content = Callable[[File], bytes]
Entries = Callable[[Directory, str], Mapping[str, Node]]


class Disk:
    """Follows what happens in a folder: `look` after every call, `sync` after every fsync."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.nodes: dict[int, Node] = {}
        self.top = Directory()
        self.look()
        for node in [self.top, *self.nodes.values()]:
            _settle(node)

    def look(self) -> bool:
        """Takes notice of what there is now; whether anything has changed."""
        seen: dict[int, Node] = {}
        changed = self._look(self.top, self.root, seen)
        self.nodes = seen
        return changed

    def _look(self, directory: Directory, path: str, seen: dict[int, Node]) -> bool:
        entries, changed = dict[str, Node](), False
        with os.scandir(path) as found:
            listed = sorted(found, key=lambda entry: entry.name)
        for entry in listed:
            facts = entry.stat(follow_symlinks=False)
            node = self.nodes.get(facts.st_ino)
            if entry.is_dir(follow_symlinks=False):
                node = node if isinstance(node, Directory) else Directory()
                changed |= self._look(node, entry.path, seen)
            else:
                stamp = (facts.st_mtime_ns, facts.st_size)
                if not isinstance(node, File):
                    node = File(_read(entry.path), None, stamp)
                elif node.stamp != stamp:
                    node.content, node.stamp, changed = _read(entry.path), stamp, True
            seen[facts.st_ino] = node
            entries[entry.name] = node
        changed |= entries != directory.entries
        directory.entries = entries
        return changed

    def sync(self, path: str) -> None:
        """The file or directory at a path is on the disk now, with all that was done to it."""
        self.look()
        node: Node = self.top
        for part in os.path.relpath(path, self.root).split(os.sep):
            if part == ".":
                break
            assert isinstance(node, Directory)
            node = node.entries[part]
        _settle(node)

    def now(self) -> Tree:
        """What a process that is killed leaves."""
        return dict(_walk(self.top, "", _content, _current))

    def halved(self, path: str, before: Tree) -> Tree:
        """What is there when the last call wrote half of what it wrote to a file."""
        tree, name = dict(self.now()), os.path.relpath(path, self.root)
        whole, old = tree.get(name) or b"", before.get(name) or b""
        start = len(old) if whole.startswith(old) else 0
        tree[name] = whole[: (start + len(whole)) // 2]
        return tree

    def crashes(self) -> Iterator[tuple[str, Tree]]:
        """What may be left of it by a power cut, each with what was lost."""
        yield "nothing that was not synced", dict(_walk(self.top, "", _synced, _settled))
        yield "names are there, contents are empty", dict(_walk(self.top, "", _synced, _current))
        yield "names are there, contents end half-way", dict(_walk(self.top, "", _half, _current))
        yield "contents are there, names are not", dict(_walk(self.top, "", _content, _settled))
        for prefix, names in _unsettled(self.top, ""):
            lost = f"all but the change of {prefix}{', '.join(sorted(names))}"
            yield lost, dict(_walk(self.top, "", _content, _all_but(prefix, names)))


def read_tree(root: str) -> Tree:
    """What is in a folder."""
    return Disk(root).now()


def write_tree(root: str, tree: Tree) -> None:
    """Makes a folder hold this and nothing else."""
    for entry in list(os.scandir(root)) if os.path.isdir(root) else ():
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)
    os.makedirs(root, exist_ok=True)
    for name, content in sorted(tree.items()):
        path = os.path.join(root, name)
        if content is None:
            os.makedirs(path, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(content)


def fingerprint(tree: Tree) -> str:
    """A digest of what is there, random parts of names aside."""
    digest = hashlib.sha256()
    names = {name: RANDOM.sub("*", name) for name in tree}
    for name in sorted(tree, key=lambda name: (names[name], name)):
        content = tree[name]
        digest.update(f"{names[name]}\0{content is None}\0{len(content or b'')}\0".encode())
        digest.update(content or b"")
    return digest.hexdigest()


def outline(tree: Tree) -> str:
    """A digest of names, random parts aside, and of which files are empty: what notes of times do not change."""
    return fingerprint({name: content and b"something" for name, content in tree.items()})


class _Sorted:
    """The entries of a directory by name, random parts of names aside: runs go through them alike."""

    def __init__(self, found: Any) -> None:
        with found:
            self.entries = iter(sorted(found, key=lambda entry: RANDOM.sub("*", entry.name)))

    def __iter__(self) -> Iterator[Any]:
        return self.entries

    def __next__(self) -> Any:
        return next(self.entries)

    def __enter__(self) -> _Sorted:
        return self

    def __exit__(self, *given: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is open."""


def in_order() -> None:
    """Directories are listed by their entries' names from here on; file systems have orders of their own."""
    plain = os.scandir
    if hasattr(plain, "in_order"):
        return

    def scandir(path: Any = ".") -> _Sorted:
        return _Sorted(plain(path))

    scandir.in_order = True  # type: ignore[attr-defined]
    os.scandir = scandir  # type: ignore[assignment]


def _walk(
    directory: Directory, prefix: str, content: Content, entries: Entries
) -> Iterator[tuple[str, bytes | None]]:
    for name, node in sorted(entries(directory, prefix).items(), key=lambda entry: entry[0]):
        path = f"{prefix}{name}"
        if isinstance(node, File):
            yield path, content(node)
        else:
            yield path, None
            yield from _walk(node, f"{path}/", content, entries)


def _unsettled(directory: Directory, prefix: str) -> Iterator[tuple[str, frozenset[str]]]:
    """Changes of a directory since it was synced: names that were made or removed, or changed places and go together."""
    changed = {
        name
        for name in {*directory.entries, *directory.synced}
        if directory.entries.get(name) is not directory.synced.get(name)
    }
    while changed:
        names = {min(changed)}
        while more := _moved_with(directory, names) & changed - names:
            names |= more
        changed -= names
        yield prefix, frozenset(names)
    for name, node in sorted(directory.entries.items(), key=lambda entry: entry[0]):
        if isinstance(node, Directory) and directory.synced.get(name) is node:
            yield from _unsettled(node, f"{prefix}{name}/")


def _moved_with(directory: Directory, names: set[str]) -> set[str]:
    """Names that hold, or held, what these names hold or held: a rename is done or not, never half."""
    nodes = {
        id(entries[name])
        for entries in (directory.entries, directory.synced)
        for name in names
        if name in entries
    }
    return {
        name
        for entries in (directory.entries, directory.synced)
        for name, node in entries.items()
        if id(node) in nodes
    }


def _all_but(above: str, names: frozenset[str]) -> Entries:
    """Entries as they are, but those of these names as they are on the disk."""

    def entries(directory: Directory, prefix: str) -> Mapping[str, Node]:
        if prefix != above:
            return directory.entries
        found = {name: node for name, node in directory.entries.items() if name not in names}
        return found | {name: node for name, node in directory.synced.items() if name in names}

    return entries


def _current(directory: Directory, prefix: str) -> Mapping[str, Node]:
    return directory.entries


def _settled(directory: Directory, prefix: str) -> Mapping[str, Node]:
    return directory.synced


def _content(file: File) -> bytes:
    return file.content


def _synced(file: File) -> bytes:
    return file.synced or b""


def _half(file: File) -> bytes:
    return file.content if file.content == file.synced else file.content[: len(file.content) // 2]


def _settle(node: Node) -> None:
    if isinstance(node, File):
        node.synced = node.content
    else:
        node.synced = dict(node.entries)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""
