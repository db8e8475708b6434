"""A run directory in the hands of chance: started, killed, resumed, changed, damaged, and written by two at once."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.faults.disk import Tree
from tests.faults.mutations import mutations
from tests.faults.runs import OUT, RUNS, Run
from tests.faults.trials import SURVIVED, WRONG, Judge, Trial
from tests.faults.values import count

SURGEON = RUNS["run: llm-surgeon, 2 shots"]
SHARES = ("0.7", "0.8")
"""Two recipes: what of the blocks stays."""
CALLS = st.integers(0, 400)
"""Numbers of file operations; a run has fewer than the largest of them."""


class World:
    """What is made once: the inputs, and what an undisturbed run of each recipe leaves."""

    def __init__(self, root: Path) -> None:
        self.trials = [Trial(_with_share(share), root / "work") for share in SHARES]
        self.place = self.trials[0].place
        self.initial: Tree = self.trials[0].initial
        self.judges: list[Judge] = [trial.judge for trial in self.trials]
        self.trials[0].warm()


def _with_share(share: str) -> Run:
    return Run(f"keep {share}", [*SURGEON.words, "--set", f"keep={share}"], SURGEON.inputs)


def machine_of(world: World) -> type[RuleBasedStateMachine]:
    """A machine that plays with this world's directory."""

    class RunDirectory(RuleBasedStateMachine):
        """Whatever happens: the inputs stay, and under the final name lies a whole run, or nothing."""

        def __init__(self) -> None:
            super().__init__()
            self.recipe = 0

        @initialize()
        def empty(self) -> None:
            world.place.fill(world.initial)

        @rule(recipe=st.integers(0, len(SHARES) - 1))
        def change_the_recipe(self, recipe: int) -> None:
            self.recipe = recipe

        @rule(overwrite=st.booleans(), resume=st.booleans())
        def call(self, overwrite: bool, resume: bool) -> None:
            self.ended(world.place.call(self.words(overwrite, resume)))

        @rule(at=CALLS, overwrite=st.booleans(), half=st.booleans())
        def killed(self, at: int, overwrite: bool, half: bool) -> None:
            ended = world.place.call(self.words(overwrite, True), at=at, kill=True, half=half)
            if ended.how == "killed":
                count("a run directory", SURVIVED)
            else:
                self.ended(ended)

        @rule(at=CALLS, overwrite=st.booleans())
        def failing(self, at: int, overwrite: bool) -> None:
            self.ended(world.place.call(self.words(overwrite, True), at=at))

        @rule(at=CALLS, other=st.integers(0, len(SHARES) - 1))
        def a_second_process(self, at: int, other: int) -> None:
            mine, theirs = self.words(True, True), self.words_of(other, True, True)
            first, second = world.place.both(mine, theirs, at=at)
            self.ended(first, alone=False)
            if second is not None:
                self.ended(second, alone=False)

        @rule(seed=st.integers(0, 1000))
        def damage_what_is_noted(self, seed: int) -> None:
            tree = world.place.tree()
            noted = sorted(name for name, data in tree.items() if ".progress/" in name and data)
            if noted:
                name = random.Random(seed).choice(noted)
                for mutation in mutations(tree[name] or b"", "bytes", count=1, seed=seed):
                    world.place.fill({**tree, name: mutation.data})

        @invariant()
        def nothing_is_damaged(self) -> None:
            tree = world.place.tree()
            problems = [judge.damage(tree) for judge in world.judges]
            assert "" in problems, problems

        def words(self, overwrite: bool, resume: bool) -> list[str]:
            return self.words_of(self.recipe, overwrite, resume)

        def words_of(self, recipe: int, overwrite: bool, resume: bool) -> list[str]:
            words = [*world.trials[recipe].run.words]
            return [
                *words,
                *(["--overwrite"] if overwrite else []),
                *(["--resume"] if resume else []),
            ]

        def ended(self, ended: Any, *, alone: bool = True) -> None:
            """Well, with the bytes of the recipe, or with an error of ours."""
            if not alone and ended.how == "returned" and ended.value.code == 0:
                count("a run directory", SURVIVED)
                return  # which of two came last is seen in the directory
            verdict, why = world.judges[self.recipe].disturbed(ended, world.place)
            assert verdict != WRONG, why
            count("a run directory", verdict)
            if verdict == SURVIVED and alone:
                assert OUT in {path.split("/")[0] for path in world.place.tree()}

    return RunDirectory
