"""Runs that are disturbed at every file operation, and what is left of them: by kills, by errors, by power cuts."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults import injection
from tests.faults.children import Ended, forked
from tests.faults.disk import Disk, Tree, fingerprint, in_order, outline, read_tree, write_tree
from tests.faults.preparation import imported_before
from tests.faults.runs import (
    INPUTS,
    TEMPORARY,
    Outcome,
    Run,
    called,
    comparable,
    complete,
    in_process_children,
    part,
    stray,
    without_temporary,
)

SECONDS = 120
"""After which a call hangs."""
WARM = ["prune", f"{INPUTS}/dense", "-o", "planned", "--dry-run", "--data", f"{INPUTS}/text.txt"]
WARM += [
    "--samples",
    "2",
    "--length",
    "8",
    "--layout",
    "per-layer",
    "--set",
    "settings.criterion=l2",
]
"""What starts no threads of torch's: a child could not go on with them."""
PAIRS = 12
"""Moments at which a second process begins."""
SORTS = ("kill", "error", "power cut", "two at once")
SURVIVED, REFUSED, WRONG = "survived", "refused", "wrong"
CHECKED_KILLS = 10
"""One kill in so many is carried out; the others are states that a trace has noted."""


@dataclass
class Verdicts:
    """What became of the faults of one sort in one run."""

    run: str
    sort: str
    tried: int = 0
    distinct: int = 0
    """States of the folder that differ among them: each is gone on from once."""
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, verdict: str, where: str, why: str = "", *, times: int = 1) -> None:
        """Counts a verdict; a wrong one with where and why."""
        self.tried += times
        self.counts[verdict] += times
        if verdict == WRONG:
            self.wrong.append(f"{where}: {why}")


@dataclass
class Trace:
    """An undisturbed run as it was watched."""

    calls: list[tuple[str, str]]
    kills: list[tuple[str, Tree, int]]
    """States that a kill leaves: after what, the state, and at how many calls it is met."""
    crashes: list[tuple[str, Tree, int]]
    """States that a power cut leaves."""
    states: list[str]
    """An outline of the state before each call."""
    outcome: Outcome


class Trial:
    """One run with all its faults, in a folder of its own."""

    def __init__(
        self, run: Run, root: Path, *, most: int | None = None, prepared: Tree | None = None
    ) -> None:
        """`most` takes an even selection of so many faults of each sort; None: all of them."""
        self.run, self.root, self.most = run, str(root), most
        self.place = Place(str(root), run.verified)
        self.initial = prepared if prepared is not None else self._prepared()
        self.expected = self._undisturbed()
        self.judge = Judge(run, self.initial, self.expected)
        if run.halved:
            self.initial = self._halfway()
            self.judge = Judge(run, self.initial, self.expected)

    def warm(self) -> None:
        """Imports what the run imports, and does once in this process what is slow the first time and starts no threads."""
        self.place.fill(self.initial)
        imported_before(lambda: self.place.inside(lambda: bool(called(self.run.anew()))))
        self.place.fill(self.initial)
        for words in (
            WARM,
            ["export", f"{INPUTS}/dense", "-o", "warm", "--format", "hf", "--no-verify"],
        ):
            self.place.inside(partial(called, words))
        gc.collect()
        gc.freeze()

    def all(self, sorts: tuple[str, ...] = SORTS) -> list[Verdicts]:
        """Every fault of every sort."""
        trace = self.trace()
        known: dict[str, tuple[str, str]] = {}
        found = []
        if "kill" in sorts:
            found.append(self._states("kill", trace.kills, known))
            self._check_kills(trace, found[-1])
        if "error" in sorts:
            found.append(self._errors(trace, known))
        if "power cut" in sorts:
            found.append(self._states("power cut", trace.crashes, known))
        if "two at once" in sorts:
            found.append(self._pairs(trace))
        return found

    def _pairs(self, trace: Trace) -> Verdicts:
        """The same call begins while the first stands still: one of them is refused, or both end well; what is there is whole."""
        verdicts = Verdicts(self.run.name, "two at once")
        for number in _selection(list(range(len(trace.calls))), self.most or PAIRS):
            self.place.fill(self.initial)
            first, second = self.place.both(self._first(), self.run.again(), at=number)
            where = f"the second at call {number} of the first"
            outcomes = [ended for ended in (first, second) if ended is not None]
            problems = [why for verdict, why in map(self._one_of_two, outcomes) if verdict == WRONG]
            well = [
                ended for ended in outcomes if ended.how == "returned" and ended.value.code == 0
            ]
            problem = problems[0] if problems else "" if well else "both were refused"
            problem = problem or self.judge.finished(self.place.tree())
            verdicts.add(
                WRONG if problem else REFUSED if len(well) < len(outcomes) else SURVIVED,
                where,
                problem,
            )
        verdicts.distinct = verdicts.tried
        return verdicts

    def _one_of_two(self, ended: Ended) -> tuple[str, str]:
        if ended.how == "returned" and ended.value.code == 0:
            return SURVIVED, ""
        return self.judge.disturbed(ended, self.place)

    def trace(self) -> Trace:
        """The run, watched call by call."""
        self.place.fill(self.initial)
        ended = forked(lambda: watched(self.place, self._first()), seconds=10 * SECONDS)
        if ended.how != "returned":
            raise AssertionError(
                f"{self.run.name} could not be watched: {ended.how}, {ended.value}"
            )
        trace: Trace = pickle.loads(ended.value)
        return trace

    def _first(self) -> list[str]:
        return self.run.again() if self.run.halved else self.run.first()

    def _prepared(self) -> Tree:
        """The inputs, and an earlier output where the run replaces one."""
        self.place.fill({})
        _returned(
            forked(lambda: self.place.inside(lambda: self.run.inputs(Path(self.root)))), self.run
        )
        if not self.run.earlier:
            return self.place.tree()
        earlier = self.run.anew()
        outcome = self.place.call(earlier)
        if outcome.value.code:
            raise AssertionError(f"{self.run.name} gave no earlier output: {outcome.value}")
        return self.place.tree()

    def _undisturbed(self) -> Tree:
        """What the run leaves, the same twice."""
        trees = []
        for _ in range(2):
            self.place.fill(self.initial)
            ended = self.place.call(self.run.first())
            if ended.how != "returned" or ended.value.code:
                raise AssertionError(f"{self.run.name} does not even run undisturbed: {ended}")
            trees.append(without_temporary(self.place.tree()))
        one, other = (comparable(tree) for tree in trees)
        if one != other:
            differing = [name for name in {*one, *other} if one.get(name) != other.get(name)]
            raise AssertionError(f"{self.run.name} gives other bytes each time: {differing}")
        return trees[0]

    def _halfway(self) -> Tree:
        """The state half-way between the first progress and its end."""
        states = [tree for _, tree, _ in self.trace_of(self.run.first()).kills]
        noted = [tree for tree in states if _only_progress(tree)]
        return noted[len(noted) // 2]

    def trace_of(self, words: list[str]) -> Trace:
        """Another call, watched."""
        self.place.fill(self.initial)
        trace: Trace = pickle.loads(
            _returned(forked(lambda: watched(self.place, words), seconds=10 * SECONDS), self.run)
        )
        return trace

    def _states(
        self, sort: str, states: list[tuple[str, Tree, int]], known: dict[str, tuple[str, str]]
    ) -> Verdicts:
        """Goes on from every state, each distinct one once."""
        verdicts = Verdicts(self.run.name, sort)
        for where, tree, times in _selection(states, self.most):
            verdicts.distinct += 1
            verdict, why = self._gone_on(tree, known, power_cut=sort == "power cut")
            verdicts.add(verdict, where, why, times=times)
        return verdicts

    def _gone_on(
        self, tree: Tree, known: dict[str, tuple[str, str]], *, power_cut: bool = False
    ) -> tuple[str, str]:
        """The verdict on a state: nothing damaged in it, and another call makes it good."""
        key = fingerprint(without_temporary(tree))
        if key not in known:
            damaged = "" if power_cut else self.judge.damage(tree)
            self.place.fill(tree)
            known[key] = (WRONG, damaged) if damaged else self.judge.next_call(self.place)
        return known[key]

    def _errors(self, trace: Trace, known: dict[str, tuple[str, str]]) -> Verdicts:
        """Every call fails once; those that write, once more with half of it written."""
        verdicts, seen = Verdicts(self.run.name, "error"), set[str]()
        points = [(number, False) for number in range(len(trace.calls))]
        points += [
            (number, True)
            for number, (kind, _) in enumerate(trace.calls)
            if kind in injection.WRITERS
        ]
        for number, half in _selection(sorted(points), self.most):
            self.place.fill(self.initial)
            ended = self.place.call(self._first(), at=number, half=half)
            kind, path = trace.calls[number]
            where = f"call {number}, {kind} {os.path.relpath(path, self.root)}{', half written' if half else ''}"
            verdict, why = self.judge.disturbed(ended, self.place)
            if verdict != WRONG and verdict != SURVIVED:
                tree = self.place.tree()
                seen.add(fingerprint(without_temporary(tree)))
                verdict, why = self._gone_on(tree, known)
            verdicts.add(verdict, where, why)
        verdicts.distinct = len(seen)
        return verdicts

    def _check_kills(self, trace: Trace, verdicts: Verdicts) -> None:
        """Some kills are carried out: they must leave what the trace says."""
        for number in range(
            0, len(trace.calls), CHECKED_KILLS if self.most is None else 10 * CHECKED_KILLS
        ):
            self.place.fill(self.initial)
            ended = self.place.call(self._first(), at=number, kill=True)
            left = outline(without_temporary(self.place.tree()))
            if ended.how != "killed" or left != trace.states[number]:
                verdicts.add(
                    WRONG,
                    f"call {number}",
                    f"a real kill ({ended.how}) leaves another state than the trace says",
                )


class Judge:
    """What a fault may leave, and what the next call must make of it."""

    def __init__(self, run: Run, initial: Tree, expected: Tree) -> None:
        self.run, self.initial, self.expected = run, without_temporary(initial), expected
        self.whole = comparable(part(expected, run.out))
        self.earlier = comparable(part(initial, run.out))

    def damage(self, tree: Tree) -> str:
        """What is wrong with a state between two calls: inputs changed, or something half under the final name."""
        if part(tree, INPUTS) != part(self.initial, INPUTS):
            return "the inputs were changed"
        out = part(tree, self.run.out)
        if not out and self.earlier:
            return "the earlier output is gone"
        if not out or comparable(out) == self.earlier:
            return ""
        visible = {name: content for name, content in out.items() if "/." not in name}
        if visible.keys() != part(self.expected, self.run.out).keys():
            return f"under the final name lies something half: {sorted(visible.keys() ^ self.whole.keys())[:5]}"
        for name, content in comparable(visible).items():
            varies = name.rpartition("/")[2] in VARYING_TEXTS
            if content != self.whole[name] and not (varies and complete(name, out[name] or b"")):
                return f"{name} is not what it should be"
        return ""

    def finished(self, tree: Tree) -> str:
        """What is wrong with the end of a run."""
        left = stray(tree, self.expected)
        return self.differs(tree) or (f"left behind: {left}" if left else "")

    def differs(self, tree: Tree) -> str:
        """What is not as an undisturbed run leaves it."""
        if part(tree, INPUTS) != part(self.initial, INPUTS):
            return "the inputs were changed"
        found = comparable(part(tree, self.run.out))
        names = sorted(
            name for name in {*found, *self.whole} if found.get(name) != self.whole.get(name)
        )
        return f"other bytes than undisturbed: {names[:5]}" if names else ""

    def disturbed(self, ended: Ended, place: Place) -> tuple[str, str]:
        """The verdict on a call in which something failed."""
        if ended.how != "returned":
            return WRONG, f"{ended.how}: {ended.value}"
        outcome: Outcome = ended.value
        if outcome.foreign:
            return WRONG, f"a traceback: {_last(outcome.foreign)}"
        if outcome.code == 0:
            return self._ended_well(place)
        if not outcome.refused:
            return (
                WRONG,
                f"exit code {outcome.code} without an error of ours: {outcome.said[-200:]}",
            )
        return REFUSED, ""

    def _ended_well(self, place: Place) -> tuple[str, str]:
        """The verdict on an end without an error; what could not be removed must be gone after the next call."""
        tree = place.tree()
        problem = self.finished(tree)
        if not problem:
            return SURVIVED, ""
        if self.differs(tree):
            return WRONG, f"ended well, but {problem}"
        again = place.call(self.run.anew())
        left = self.finished(place.tree())
        well = again.how == "returned" and again.value.code == 0
        return (
            (SURVIVED, "") if well and not left else (WRONG, f"ended well, but {problem}, for good")
        )

    def next_call(self, place: Place) -> tuple[str, str]:
        """The verdict on the call after it: the bytes of an undisturbed run, at once or after an error that says what to do."""
        before = place.tree()
        ended = place.call(self.run.again())
        verdict, why = self.disturbed(ended, place)
        if verdict != REFUSED:
            return verdict, why and f"the next call: {why}"
        damaged = self.damage(place.tree()) if not self.damage(before) else ""
        if damaged:
            return WRONG, f"the next call was refused, and {damaged}"
        said = _error(ended.value.said)
        verdict, why = self.disturbed(place.call(self.run.anew()), place)
        if verdict == SURVIVED:
            return REFUSED, ""
        return WRONG, f"no way on: {said}; then {why or 'refused again'}"


VARYING_TEXTS = ("report.json", "report.md", "report.html", "README.md")
"""What a run completes once the model is safe."""


@dataclass
class Place:
    """A working directory with its own folder for temporary files."""

    root: str
    verified: bool = True
    """Whether what was saved is loaded again by a child."""

    def fill(self, tree: Tree) -> None:
        """Makes it hold this, and an empty folder for temporary files."""
        write_tree(self.root, without_temporary(tree))
        os.makedirs(os.path.join(self.root, TEMPORARY))

    def tree(self) -> Tree:
        """What it holds."""
        return read_tree(self.root)

    def inside(self, function: Callable[[], Any]) -> Any:
        """Calls a function there; for a child, which ends afterwards."""
        tempfile.tempdir = os.path.join(self.root, TEMPORARY)
        os.environ["TMPDIR"] = tempfile.tempdir
        os.chdir(self.root)
        in_process_children(verified=self.verified)
        in_order()
        return function()

    def call(
        self, words: list[str], *, at: int = -1, kill: bool = False, half: bool = False
    ) -> Ended:
        """A command there in a child, with the call of that number disturbed."""

        def command() -> Outcome:
            if at >= 0:
                injection.start(injection.Shim(self.root, at=at, kill=kill, half=half))
            outcome = called(words)
            injection.stop()
            return outcome

        return forked(lambda: self.inside(command), seconds=SECONDS)

    def both(self, words: list[str], others: list[str], *, at: int) -> tuple[Ended, Ended | None]:
        """Two commands at once: the second runs while the first stands still before the call of that number, if it gets there."""
        second: list[Ended] = []

        def command() -> Outcome:
            injection.start(injection.Shim(self.root, at=at, signal=signal.SIGSTOP))
            outcome = called(words)
            injection.stop()
            return outcome

        first = forked(
            lambda: self.inside(command),
            seconds=SECONDS,
            meanwhile=lambda: second.append(self.call(others)),
        )
        return first, (second[0] if second else None)


def watched(place: Place, words: list[str]) -> bytes:
    """Runs a command and notes every state on the way; pickled, so that contents are there once."""
    os.makedirs(os.path.join(place.root, TEMPORARY), exist_ok=True)
    notes = _Notes(place.root)
    notes.take("before the first call")
    shim = injection.Shim(place.root, after=notes.after)

    def command() -> Outcome:
        injection.start(shim)
        outcome = called(words)
        injection.stop()
        return outcome

    outcome = place.inside(command)
    notes.states.append(notes.outline)
    notes.cut()
    trace = Trace(
        shim.calls, list(notes.kills.values()), list(notes.crashes.values()), notes.states, outcome
    )
    return pickle.dumps(trace)


SETTLING = ("fsync", "replace", "rename", "unlink", "rmdir")
"""A power cut comes before each of these, when most is at stake: between two of them, what is not on the disk grows."""


class _Notes:
    """States by their digests."""

    def __init__(self, root: str) -> None:
        self.root, self.disk = root, Disk(root)
        self.kills: dict[str, Any] = {}
        self.crashes: dict[str, Any] = {}
        self.states: list[str] = []
        self.outline, self.where = "", ""
        self.tree: Tree = {}

    def take(self, where: str) -> None:
        """Notes the present state."""
        self.tree = self.disk.now()
        self._note(self.kills, where, self.tree)
        self.outline = outline(without_temporary(self.tree))
        self.where = where

    def cut(self) -> None:
        """Notes what a power cut makes of the present state."""
        for lost, tree in self.disk.crashes():
            self._note(self.crashes, f"{self.where}: {lost}", tree)

    def after(self, kind: str, path: str) -> None:
        """Notes what a call has made."""
        injection_active = injection._active[:]
        injection.stop()
        try:
            self.states.append(self.outline)
            before = self.tree
            if kind in SETTLING:
                self.cut()
            changed = self.disk.look()
            where = f"after call {len(self.states) - 1}, {kind} {os.path.relpath(path, self.root)}"
            if changed and kind in injection.WRITERS:
                self._note(self.kills, f"half-way in {where[6:]}", self.disk.halved(path, before))
            if kind == "fsync":
                self.disk.sync(path)
            if changed or kind == "fsync":
                self.take(where)
            else:
                self._note(self.kills, where, self.tree)
        finally:
            injection._active[:] = injection_active

    def _note(self, states: dict[str, Any], where: str, tree: Tree) -> None:
        tree = without_temporary(tree)
        key = fingerprint(tree)
        first, _, times = states.get(key, (where, tree, 0))
        states[key] = (first, tree, times + 1)


def _selection(found: list[Any], most: int | None) -> Iterator[Any]:
    """All, or so many of them, evenly."""
    if most is None or len(found) <= most:
        yield from found
        return
    for number in range(most):
        yield found[number * len(found) // most]


def _only_progress(tree: Tree) -> bool:
    """Whether a run has noted something, and not begun to write its output."""
    return any(".progress/" in name for name in tree) and not any(
        "partial" in name for name in tree
    )


def _returned(ended: Ended, run: Run) -> Any:
    if ended.how != "returned":
        raise AssertionError(f"{run.name}: {ended.how}, {ended.value}")
    return ended.value


def _last(traceback: str) -> str:
    """The error of a traceback, and the place in our code that it passed last."""
    lines = traceback.strip().splitlines()
    ours = [line.strip() for line in lines if "/resect/" in line and "File" in line]
    return f"{lines[-1][:200]} [{ours[-1][-90:] if ours else ''}]"


def _error(said: str) -> str:
    return next((line for line in said.splitlines() if "error:" in line), said.strip()[-200:])[:300]
