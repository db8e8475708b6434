"""The README of a checkpoint: what it is and how to load it."""

from __future__ import annotations

from typing import Any

STOCK = """model = AutoModelForCausalLM.from_pretrained(directory)"""
SHIPPED = """# Its layers have sizes of their own; modeling_resect.py, beside it, builds them. Read it, then trust it.
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)"""
TOKENIZER = """tokenizer = AutoTokenizer.from_pretrained(directory)"""


def card(saved: Any, *, has_tokenizer: bool) -> str:
    """Markdown for a `Saved` model: parameters, layout, and the lines that load it."""
    uniform = saved.layout == "uniform"
    names = "AutoModelForCausalLM, AutoTokenizer" if has_tokenizer else "AutoModelForCausalLM"
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [pruning, resect]",
        "---",
        "# A model with parts removed",
        "",
        f"{saved.parameters:,} parameters; model type `{saved.model_type}`{_relabelled(saved)}.",
        _sizes(saved),
        "",
        "```python",
        f"from transformers import {names}",
        "",
        'directory = "."',
        STOCK if uniform else SHIPPED,
        *([TOKENIZER] if has_tokenizer else []),
        "```",
    ]
    if not uniform:
        lines += [
            "",
            "Without remote code, with resect installed:",
            "",
            "```python",
            "import resect",
            "",
            'model = resect.load(".")',
            "```",
        ]
    return "\n".join([*lines, "", "`resect.json` says what was removed.", ""])


def _relabelled(saved: Any) -> str:
    return f" (the same mathematics as the dense model's `{saved.relabelled_from}`)" if saved.relabelled_from else ""


def _sizes(saved: Any) -> str:
    if saved.layout != "uniform":
        return f"No stock configuration describes it: {saved.reason}."
    changes = ", ".join(f"`{name}` {value}" for name, value in saved.changes.items())
    return f"A stock configuration describes it{': ' + changes if changes else ''}."
