"""An analysis by name: load, test every group, write the figures and the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from resect.checkpoint import load, load_tokenizer
from resect.explain import telling
from resect.files import claimed_directory, whole_directory
from resect.methods import Knowledge, analyze
from resect.methods.knowledge import ANALYSED, LIMIT, RATIOS, check_analysis, check_text
from resect.recipe.measure import Announce, device_of, dtype_of
from resect.report import knowledge_html, knowledge_markdown, knowledge_png
from resect.surroundings import unaffected


@telling("analyse the model")
@unaffected()
def analysis(
    name: str,
    output: str | Path,
    *,
    text: str = "demo",
    kinds: Sequence[str] = ANALYSED,
    ratios: Sequence[float] = RATIOS,
    gamma: float = 0.1,
    units: str = "magnitude",
    window: int = 128,
    limit: int | None = LIMIT,
    seed: int = 42,
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    announce: Announce = lambda what: None,
) -> Knowledge:
    """What every coupled group of a model is worth (`resect.analyze`), written to a directory.

    That holds `analysis.json`, which `protect` takes, `analysis.md`, and the picture as `analysis.png` and `analysis.html`; it is
    whole or not there. Raises `UsageError`, `DataError`, `ModelError`, `NumericsError` or `CheckpointError`.
    """
    check_analysis(kinds=kinds, ratios=ratios, gamma=gamma, units=units, window=window, limit=limit, seed=seed)
    with claimed_directory(output, overwrite=overwrite, inputs=[name, text]) as directory:
        announce(f"load {name}")
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        model = load(
            name,
            dtype=dtype_of(dtype),
            device=device_of(device),
            trust_remote_code=trust_remote_code,
            check=partial(check_text, tokenizer=tokenizer, window=window),
        )
        announce(f"remove a part of every group alone, {units}")
        found = analyze(
            model,
            tokenizer,
            text=text,
            kinds=kinds,
            ratios=ratios,
            gamma=gamma,
            units=units,
            window=window,
            limit=limit,
            seed=seed,
            name=name,
        )
        with whole_directory(directory, overwrite=overwrite) as folder:
            (folder / "analysis.json").write_text(found.to_json(), encoding="utf-8")
            (folder / "analysis.md").write_text(knowledge_markdown(found), encoding="utf-8")
            (folder / "analysis.html").write_text(knowledge_html(found), encoding="utf-8")
            (folder / "analysis.png").write_bytes(knowledge_png(found))
    announce(f"done: {directory}")
    return found
