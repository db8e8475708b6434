"""The commands that look at a model: what its groups are worth, and what it answers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

import resect.recipe.runs
from resect.cli import app
from resect.methods import Knowledge
from resect.plan import Plan


def resect_(*words: object, typed: str | None = None) -> Result:
    found: Any = CliRunner().invoke(app, [str(word) for word in words], input=typed)
    return found


def test_an_analysis_is_written_and_protects(
    dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resect.recipe.runs, "verify", lambda directory, model: 0.0)
    asked = ["--text", text, "--window", 16, "--limit", 64, "--ratios", "0.3,0.6", "--gamma", 0.3]
    result = resect_("analyze", dense, "-o", tmp_path / "look", *asked)
    assert result.exit_code == 0, result.stderr
    made = {f"analysis.{end}" for end in ("json", "md", "png", "html")}
    assert {file.name for file in (tmp_path / "look").iterdir()} == {*made, "resect.json"}
    found = Knowledge.from_json((tmp_path / "look" / "analysis.json").read_text())
    assert (found.ratios, len(found.groups), len(found.protected), found.passing) == ([0.3, 0.6], 6, 2, True)
    assert (tmp_path / "look" / "analysis.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "look" / "analysis.html").read_text()
    assert "src=" not in re.sub(r"<script[^>]*>.*?</script>", "", page, flags=re.DOTALL)  # nothing is fetched
    assert not re.search(r"<script[^>]*\ssrc=", page)
    for name in found.protected:
        assert name in page
        assert re.search(rf"\| {re.escape(name)} \|.*\* \|", (tmp_path / "look" / "analysis.md").read_text())
        assert name in result.stdout.replace("\n", "")
    flags = ["--layout", "per-layer", "--set", "settings.criterion=l2", "--keep", 0.7]
    for protect, whole in ((tmp_path / "look" / "analysis.json", set(found.protected)), (found.groups[0].name, set())):
        out = tmp_path / f"out{len(whole)}"
        done = resect_("prune", dense, "-o", out, "--protect", protect, *flags, "--json", "--dry-run")
        report = json.loads(done.stdout)
        assert set(report["protected"]) == (whole or {found.groups[0].name})
        assert report["knowledge"] == (json.loads(found.to_json()) if whole else None)
        assert ('href="#knowledge"' in (out / "report.html").read_text()) == bool(whole)
        assert not set(report["protected"]) & set(Plan.from_json((out / "plan.json").read_text()).removed())
        assert report["recipe"]["protect"] == [str(protect)]


def test_what_cannot_be_analysed_is_refused(dense: Path, text: Path, tmp_path: Path) -> None:
    asked = ["analyze", dense, "-o", tmp_path / "look", "--text", text]
    for more, code, said in (
        (["--ratios", "a"], 2, "it is one number or several"),
        (["--ratios", "2"], 2, "lies in (0, 1]"),
        (["--gamma", "-1"], 2, "lies in [0, 1]"),
        (["--window", "64", "--limit", "32"], 1, "the text has 32"),
    ):
        result = resect_(*asked, *more)
        assert result.exit_code == code
        assert said in result.stderr
        assert not (tmp_path / "look").exists()


def test_two_models_answer_line_by_line(dense: Path, tmp_path: Path) -> None:
    lines = "The river\n\n/reset\n/nonsense\nThe river\n/exit\nnever\n"
    alone = resect_("chat", dense, "--max-new-tokens", 8, typed=lines)
    assert alone.exit_code == 0, alone.stderr
    answers = re.findall(r"^(.+)\n\d+ tokens, [\d.]+ tokens/s$", alone.stdout, flags=re.MULTILINE)
    assert len(answers) == 2
    assert answers[0] == answers[1]  # nothing was left of the first
    assert "forgotten" in alone.stdout
    assert "There is no command /nonsense" in alone.stdout
    assert str(dense) not in alone.stdout
    other = tmp_path / "other"
    other.symlink_to(dense)
    both = resect_("chat", dense, "--beside", other, "--max-new-tokens", 8, typed="The river\n")
    assert both.exit_code == 0, both.stderr
    first, second = both.stdout.index(f"{dense}:\n"), both.stdout.index(f"{other}:\n")
    assert first < second
    assert both.stdout.count(answers[0]) == 2


def test_a_model_does_not_answer_beside_itself(dense: Path) -> None:
    result = resect_("chat", dense, "--beside", dense, typed="Hello\n")
    assert result.exit_code == 2
    assert "named twice" in result.stderr
