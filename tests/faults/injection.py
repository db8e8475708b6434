"""A shim over what writes and reads files: it counts the calls below a folder, and lets one of them fail or be the last.

Python's own calls are replaced one by one (`open`, `write`, `fsync`, `replace`, `rename`, `mkdir`, `unlink`, `rmdir`, `chmod`,
and with them `shutil.rmtree`). What safetensors, torch, tokenizers and numpy write from C++ and Rust does not pass there, so
their functions are replaced as a whole: such a call fails before its file is opened or with half of it written.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.children import KILLED

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EDQUOT)
"""By turns: disk full, damaged disk, permission, read-only, quota."""
READING = (errno.EIO, errno.EACCES)
WRITERS = ("write", "safetensors", "torch", "tokenizers", "numpy")
"""Kinds of calls that may end in the middle of their data."""


@dataclass
class Shim:
    """Counts the calls that touch files below `root`; `at` is the number of the one that does not come through."""

    root: str
    at: int = -1
    kill: bool = False
    """The process ends there; else the call fails."""
    signal: int = 0
    """The process gets this signal there, and the call comes through."""
    half: bool = False
    """Calls that write do so with half of their data first."""
    after: Callable[[str, str], None] | None = None
    """Is told of every call that was made, its kind and path, whether it found what it wanted or not."""
    calls: list[tuple[str, str]] = field(default_factory=list)

    def call(
        self,
        kind: str,
        path: str,
        perform: Callable[[], Any],
        half: Callable[[], Any] | None = None,
    ) -> Any:
        """What `perform` gives, unless this is the call that was chosen."""
        number = len(self.calls)
        self.calls.append((kind, path))
        if number == self.at:
            if self.half and half is not None:
                half()
            if self.kill:
                os._exit(KILLED)
            if self.signal:
                os.kill(os.getpid(), self.signal)
                return perform()
            raise _error(kind, path, number)
        try:
            return perform()
        finally:
            if self.after is not None:
                self.after(kind, path)


def _error(kind: str, path: str, number: int) -> BaseException:
    """What the function would raise, in its own words."""
    codes = READING if kind.startswith("read") else ERRORS
    code = codes[number % len(codes)]
    said = os.strerror(code)
    if kind == "safetensors":
        from safetensors import SafetensorError

        return SafetensorError(f"Error while serializing: I/O error: {said} (os error {code})")
    if kind == "torch":
        return RuntimeError(
            f"[enforce fail at inline_container.cc:829] . PytorchStreamWriter failed writing file: {said}"
        )
    if kind == "tokenizers":
        return Exception(f"{said} (os error {code})")
    if kind == "numpy":
        return OSError(f"{64} requested and {0} written")
    return OSError(code, said, path)


_active: list[Shim] = []
_original: dict[str, Any] = {}
_replaced: list[tuple[Any, str, Any]] = []
"""What was replaced: where, under which name, and what was there."""


def start(shim: Shim) -> Shim:
    """From here on, calls go through the shim; there is no way back but the end of the process."""
    install()
    _active[:] = [shim]
    return shim


def stop() -> None:
    """Calls are no longer counted."""
    _active.clear()


def _watched(path: Any, dir_fd: int | None = None) -> str | None:
    """The absolute path, if it is the folder that is watched, or lies below it."""
    if not _active:
        return None
    if isinstance(path, int):
        return _of_descriptor(path)
    text = os.fspath(path)
    text = os.fsdecode(text) if isinstance(text, bytes) else text
    if dir_fd is not None:
        text = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), text)
    text = os.path.abspath(text)
    return text if _is_inside(text) else None


def _is_inside(text: str) -> bool:
    """Whether an absolute path is watched: the folder itself counts, whose names are flushed too."""
    root = _active[0].root
    return text == root or text.startswith(root + os.sep)


def _of_descriptor(descriptor: int) -> str | None:
    try:
        text = os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return None
    return text if _active and _is_inside(text) else None


class _Raw(io.FileIO):
    """A file whose writes are counted."""

    def write(self, data: Any) -> int:
        path = _watched(self.name)
        if path is None:
            return super().write(data)
        view, whole = memoryview(data).cast("B"), super().write
        found: int = _active[0].call(
            "write", path, lambda: whole(view), lambda: whole(view[: len(view) // 2])
        )
        return found


def _open(
    file: Any,
    mode: str = "r",
    buffering: int = -1,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    closefd: bool = True,
    opener: Any = None,
) -> Any:
    plain = _original["open"]
    path = None if isinstance(file, int) else _watched(file)
    if path is None:
        return plain(file, mode, buffering, encoding, errors, newline, closefd, opener)
    if not set(mode) & set("wax+"):
        return _active[0].call(
            "read",
            path,
            lambda: plain(file, mode, buffering, encoding, errors, newline, closefd, opener),
        )
    raw = _active[0].call(
        "open", path, lambda: _Raw(file, mode.replace("b", "").replace("t", ""), closefd, opener)
    )
    if buffering == 0:
        return raw
    size = buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
    buffered: Any = io.BufferedRandom(raw, size) if "+" in mode else io.BufferedWriter(raw, size)
    return (
        buffered
        if "b" in mode
        else io.TextIOWrapper(buffered, encoding, errors, newline, buffering == 1)
    )


def _one(kind: str, name: str) -> Callable[..., Any]:
    """A shim of a function of `os` whose first argument is a path or a descriptor."""

    def call(path: Any, *rest: Any, dir_fd: int | None = None, **named: Any) -> Any:
        plain, named = _original[name], named | ({} if dir_fd is None else {"dir_fd": dir_fd})
        watched = _watched(path, dir_fd)
        if watched is None:
            return plain(path, *rest, **named)
        return _active[0].call(kind, watched, lambda: plain(path, *rest, **named))

    return call


def _os_open(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
    watched = _watched(path, dir_fd)
    kind = "open" if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else "read"
    plain = _original["os.open"]
    if watched is None:
        return int(plain(path, flags, mode, dir_fd=dir_fd))
    return int(_active[0].call(kind, watched, lambda: plain(path, flags, mode, dir_fd=dir_fd)))


def _os_write(descriptor: int, data: Any) -> int:
    watched, plain = _of_descriptor(descriptor), _original["os.write"]
    if watched is None:
        return int(plain(descriptor, data))
    view = memoryview(data).cast("B")
    whole, part = lambda: plain(descriptor, view), lambda: plain(descriptor, view[: len(view) // 2])
    return int(_active[0].call("write", watched, whole, part))


def _function(
    kind: str, name: str, place: Callable[..., Any], half: bool = True
) -> Callable[..., Any]:
    """A shim of a library's function; `place` finds the path among its arguments."""

    def call(*given: Any, **named: Any) -> Any:
        plain = _original[name]
        path = place(*given, **named)
        watched = _watched(path) if isinstance(path, str | os.PathLike | int) else None
        if watched is None:
            return plain(*given, **named)

        def part() -> None:
            plain(*given, **named)
            os.truncate(watched, os.path.getsize(watched) // 2)

        return _active[0].call(
            kind, watched, lambda: plain(*given, **named), part if half else None
        )

    return call


def install() -> None:
    """Puts the shims in, once for a process and its children; without an active shim they do nothing."""
    if _original:
        return
    import gguf
    import safetensors
    import safetensors.numpy
    import safetensors.torch
    import torch
    from transformers import PreTrainedTokenizerFast

    _original.update({"open": builtins.open, "os.open": os.open, "os.write": os.write})
    _put(builtins, "open", _open)
    _put(io, "open", _open)
    _put(os, "open", _os_open)
    _put(os, "write", _os_write)
    for name in (
        "fsync",
        "mkdir",
        "unlink",
        "remove",
        "rmdir",
        "chmod",
        "truncate",
        "ftruncate",
        "rename",
        "replace",
    ):
        _original[name] = getattr(os, name)
        moves = name in ("rename", "replace")
        _put(
            os, name, _moving(name) if moves else _one("unlink" if name == "remove" else name, name)
        )
    _everywhere(
        safetensors.serialize_file,
        "serialize_file",
        "safetensors",
        lambda tensors, path, *rest, **named: path,
    )
    _everywhere(
        safetensors.safe_open, "safe_open", "read safetensors", lambda path, *rest, **named: path
    )
    _everywhere(torch.save, "torch.save", "torch", lambda thing, path, *rest, **named: path)
    _everywhere(torch.load, "torch.load", "read torch", lambda path, *rest, **named: path)
    _tokenizers(PreTrainedTokenizerFast)
    _gguf(gguf.GGUFWriter)


def uninstall() -> None:
    """Puts everything back."""
    stop()
    for place, name, before in reversed(_replaced):
        setattr(place, name, before)
    _replaced.clear()
    _original.clear()


def _put(place: Any, name: str, shim: Any) -> None:
    _replaced.append((place, name, getattr(place, name)))
    setattr(place, name, shim)


def _moving(name: str) -> Callable[..., Any]:
    def call(source: Any, target: Any, **named: Any) -> Any:
        plain, watched = _original[name], _watched(target) or _watched(source)
        if watched is None:
            return plain(source, target, **named)
        return _active[0].call(name, watched, lambda: plain(source, target, **named))

    return call


def _everywhere(function: Any, name: str, kind: str, place: Callable[..., Any]) -> None:
    """Replaces a function in every module that has imported it."""
    _original[name] = function
    shim = _function(kind, name, place, half=not kind.startswith("read"))
    for module in list(sys.modules.values()):
        for attribute, value in list(vars(module).items()) if hasattr(module, "__dict__") else ():
            if value is function:
                _put(module, attribute, shim)


def _tokenizers(tokenizer_class: Any) -> None:
    """tokenizer.json is written by Rust: the method that has it written stands for that."""
    _original["tokenizer"] = tokenizer_class._save_pretrained

    def place(self: Any, save_directory: Any, *rest: Any, **named: Any) -> str:
        return str(Path(save_directory) / "tokenizer.json")

    _put(tokenizer_class, "_save_pretrained", _function("tokenizers", "tokenizer", place))


def _gguf(writer_class: Any) -> None:
    """The tensors of a GGUF are written by numpy past Python's files."""
    _original["gguf"] = writer_class.write_tensors_to_file

    def tensors(self: Any, *rest: Any, **named: Any) -> Any:
        for file in self.fout or ():
            file.flush()
        path = str(self.fout[0].name) if self.fout else ""
        watched = _watched(path) if path else None
        if watched is None:
            return _original["gguf"](self, *rest, **named)

        def whole() -> None:
            _original["gguf"](self, *rest, **named)

        def half() -> None:
            whole()
            os.truncate(path, os.path.getsize(path) // 2)

        return _active[0].call("numpy", watched, whole, half)

    _put(writer_class, "write_tensors_to_file", tensors)
