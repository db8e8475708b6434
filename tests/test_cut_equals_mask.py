"""Cut equals mask: for every family, kind of group and random plan, the small model computes what the masked does."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

import resect
from resect.checkpoint import save
from resect.errors import UsageError
from resect.graph import DEPTH, Graph
from resect.plan import Plan
from tests.models import (
    FAMILIES,
    assert_same_logits,
    assert_untouched,
    copy_of,
    logits_with_cache,
    logits_without_cache,
    random_plan,
    random_tokens,
    snapshot,
)
from tests.reference import count_parameters, reference

# Units that must at least be found: heads per layer, channels per layer, residual channels, blocks. A head unit is a KV
# head with its query heads; where all query heads share the one KV head, a query head. 0: stays whole, as noted.
FLOOR: dict[str, tuple[int, int, int, int]] = {
    "llama": (2, 56, 60, 3),
    "llama_mha": (6, 56, 60, 3),
    "llama_mqa": (6, 56, 60, 3),
    "llama_tied": (2, 56, 60, 3),
    "llama_biases": (2, 56, 60, 3),
    "mistral": (2, 56, 60, 3),
    "qwen2": (2, 56, 48, 3),
    "qwen2_sliding": (2, 56, 48, 3),
    "qwen3": (2, 56, 60, 3),
    "phi": (2, 56, 48, 3),
    "phi_qk": (2, 56, 48, 3),
    "phi3": (2, 56, 48, 3),
    "gemma": (2, 56, 60, 3),
    "gemma2": (2, 56, 60, 3),
    "olmo2": (2, 56, 48, 3),
    "opt": (6, 56, 48, 3),
    "gpt2": (6, 56, 48, 3),
    "gpt_neox": (6, 56, 48, 3),
    "gpt_neox_serial": (6, 56, 48, 3),
    "bloom": (0, 192, 48, 3),  # the ALiBi slopes are constants per head
    "falcon_gqa": (2, 56, 48, 3),
    "falcon_mqa": (6, 56, 48, 3),
    "falcon_alibi": (0, 56, 48, 3),  # the ALiBi slopes are constants per head
    "glm": (2, 56, 60, 3),
    "glm4": (2, 56, 60, 3),
    "stablelm": (2, 56, 48, 3),
    "stablelm_qk": (0, 56, 48, 3),  # one norm module per head: a loop over modules, not an axis
    "cohere": (2, 56, 48, 3),
    "cohere_qk": (2, 56, 48, 3),
    "starcoder2": (2, 56, 48, 3),
    "smollm3": (2, 56, 48, 3),
}
KINDS = ("heads", "channels", "residual", "sublayers", "blocks")
LAYERS = 3
MIXTURES = [  # a residual width is one for the whole model, and blocks go or stay: there is one layout of each
    (("heads",), False),
    (("residual",), True),
    (("blocks",), True),
    (("sublayers",), True),
    (("heads", "channels"), True),
    (KINDS, False),
]
CASES = [
    (family, kinds, uniform)
    for family in FLOOR
    for kinds, uniform in MIXTURES
    if FLOOR[family][0] or kinds != ("heads",)
]
STOCK = ("llama", "llama_tied", "mistral", "qwen2", "qwen3", "gemma", "starcoder2", "smollm3", "cohere")
"""Families whose uniformly cut heads and channels a stock config can say."""


def case_name(family: str, kinds: tuple[str, ...], uniform: bool) -> str:
    """A directory name for a case."""
    return f"{family}-{'+'.join(kinds)}-{'uniform' if uniform else 'per-layer'}"


@functools.cache
def dense(family: str) -> tuple[PreTrainedModel, Graph]:
    """The family's tiny model and its graph, for reading only."""
    model = FAMILIES[family]()
    before = snapshot(model)
    graph = resect.trace(model)
    assert_untouched(model, before)
    return model, graph


@functools.cache
def tokens() -> Tensor:
    """Enough tokens [2, 12] to leave every sliding window behind."""
    return random_tokens(2, 12, seed=3)


def plan_for(family: str, kinds: tuple[str, ...], uniform: bool) -> Plan:
    """The random plan of a case: the first of a few seeds that removes anything."""
    _, graph = dense(family)
    for seed in range(11, 31):
        plan = random_plan(graph, seed, uniform=uniform, kinds=kinds)
        if any(len(kept.keep) < kept.units for kept in plan.groups.values()):
            return plan
    raise AssertionError(f"nothing to remove in {family} for {kinds}")


@functools.cache
def cut_model(family: str, kinds: tuple[str, ...], uniform: bool) -> PreTrainedModel:
    """The case's model after surgery, for reading only."""
    model, graph = dense(family)
    small = copy_of(model)
    resect.cut(small, plan_for(family, kinds, uniform), graph)
    return small


def test_the_floor_names_every_family() -> None:
    assert FLOOR.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", FLOOR)
def test_finds_at_least(family: str) -> None:
    _, graph = dense(family)
    units = {kind: [group.units for group in graph.groups if group.kind == kind] for kind in KINDS}
    heads, channels, residual, blocks = FLOOR[family]
    assert units["heads"] == ([heads] * LAYERS if heads else [])
    assert units["channels"] == [channels] * LAYERS
    assert units["residual"] == [residual]
    assert units["blocks"] == [1] * blocks
    assert units["sublayers"] == [1] * 2 * blocks
    if not heads:
        assert any(frozen.reason for frozen in graph.frozen), "whole heads, and no word why"


@pytest.mark.parametrize("family", FLOOR)
def test_groups_are_sound(family: str) -> None:
    """Indices lie inside their axis, no two units of a member share a position, shapes are the model's own."""
    model, graph = dense(family)
    parameters = dict(model.named_parameters())
    assert graph.shapes == {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    assert graph.blocks.count == LAYERS
    assert len({group.name for group in graph.groups}) == len(graph.groups)
    for group in graph.groups:
        sides = [(member.parameter, member.axis) for member in group.members]
        assert len(set(sides)) == len(sides), f"{group.name} lists one side twice"
        for member in group.members:
            size = graph.shapes[member.parameter][member.axis]
            positions = member.index.flatten()
            assert member.index.shape[0] == group.units
            assert positions.min() >= 0
            assert positions.max() < size
            assert positions.unique().numel() == positions.numel()
            assert group.kind in DEPTH or group.layer is None or f".{group.layer}." in member.parameter


@pytest.mark.parametrize("family", FLOOR)
def test_needs_no_weights(family: str) -> None:
    """The meta model gives the graph of the real one."""
    model, graph = dense(family)
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    other = resect.trace(skeleton)
    for one, two in zip(other.groups, graph.groups, strict=True):
        assert (one.name, one.kind, one.layer, one.units, one.mixed) == (
            two.name,
            two.kind,
            two.layer,
            two.units,
            two.mixed,
        )
        for a, b in zip(one.members, two.members, strict=True):
            assert (a.parameter, a.axis) == (b.parameter, b.axis)
            assert torch.equal(a.index, b.index)


@pytest.mark.parametrize(("family", "kinds", "uniform"), CASES, ids=[case_name(*case) for case in CASES])
def test_cut_equals_mask(family: str, kinds: tuple[str, ...], uniform: bool) -> None:
    """The cut model, the package's mask and these tests' reference agree, with and without cache; the mask vanishes."""
    model, graph = dense(family)
    plan = plan_for(family, kinds, uniform)
    expected = logits_without_cache(reference(model, graph, plan), tokens())
    before = snapshot(model)
    with resect.masked(model, plan, graph):
        masked = logits_without_cache(model, tokens()), logits_with_cache(model, tokens())
    assert_untouched(model, before)
    small = cut_model(family, kinds, uniform)
    count = sum(parameter.numel() for parameter in small.parameters())
    assert count == count_parameters(graph, plan) == graph.parameter_count(plan.removed())
    cut = logits_without_cache(small, tokens()), logits_with_cache(small, tokens())
    for what, found in (("cut", cut), ("mask", masked)):
        assert_same_logits(found[0], expected, what=f"{what}, without cache")
        assert_same_logits(found[1], expected, what=f"{what}, with cache")


def test_masked_restores_after_an_error() -> None:
    model, _ = dense("llama")
    plan = plan_for("llama", KINDS, False)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt), resect.masked(model, plan):
        raise KeyboardInterrupt
    assert_untouched(model, before)


def test_mask_in_place_equals_cut() -> None:
    model, _ = dense("qwen3")
    plan = plan_for("qwen3", ("heads", "channels"), False)
    masked = copy_of(model)
    assert resect.mask(masked, plan) is masked
    assert sum(p.numel() for p in masked.parameters()) == sum(p.numel() for p in model.parameters())
    small = resect.cut(copy_of(model), plan)
    assert_same_logits(logits_with_cache(small, tokens()), logits_without_cache(masked, tokens()))


def test_cut_keeps_mode_and_flags() -> None:
    """Cutting changes shapes, not what trains or which mode a module is in; tied weights stay tied."""
    model = copy_of(dense("llama_tied")[0])
    model.train()
    model.get_parameter("model.layers.1.mlp.up_proj.weight").requires_grad_(False)
    small = resect.cut(model, plan_for("llama_tied", KINDS[:3], False))
    assert small is model
    assert all(module.training for module in small.modules())
    frozen = [name for name, parameter in small.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.layers.1.mlp.up_proj.weight"]
    assert small.lm_head.weight is small.model.embed_tokens.weight


def test_cutting_a_cut_model_is_refused() -> None:
    """A plan counts units of the dense model; plans compose instead."""
    model, graph = dense("llama")
    plan = plan_for("llama", ("channels",), True)
    small = resect.cut(copy_of(model), plan, graph)
    with pytest.raises(UsageError, match="cut already"):
        resect.cut(small, plan)


def test_shots_compose() -> None:
    """Cutting by `a & b` is masking by a and then by b."""
    model, graph = dense("llama_biases")
    first, second = (random_plan(graph, seed, uniform=False, kinds=("channels",)) for seed in (1, 2))
    twice = reference(reference(model, graph, first), graph, second)
    small = resect.cut(copy_of(model), first & second, graph)
    assert_same_logits(logits_without_cache(small, tokens()), logits_without_cache(twice, tokens()))


@pytest.mark.parametrize("family", ["llama", "mistral", "opt", "gpt2", "gpt_neox", "gemma2", "bloom"])
def test_padded_batches(family: str) -> None:
    """With padding on the left of one sequence, the ordinary positions agree."""
    model, graph = dense(family)
    masked = reference(model, graph, plan_for(family, KINDS, False))
    attention = torch.ones_like(tokens())
    attention[0, :4] = 0
    with torch.no_grad():
        found = cut_model(family, KINDS, False)(tokens(), attention_mask=attention).logits
        expected = masked(tokens(), attention_mask=attention).logits
    assert_same_logits(found[attention.bool()], expected[attention.bool()])


def test_generates_after_a_cut() -> None:
    """Greedy generation of the cut model follows the argmax of the masked one."""
    model, graph = dense("mistral")
    plan = plan_for("mistral", KINDS, False)
    small = copy_of(model)
    resect.cut(small, plan)
    start = tokens()[:1, :4]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    written = small.generate(start, attention_mask=torch.ones_like(start), **options)  # type: ignore[operator]
    logits = logits_without_cache(reference(model, graph, plan), written)
    assert written[0, 4:].tolist() == logits[0, 3:-1].argmax(-1).tolist()


Reloaded = tuple[dict[str, dict[str, str]], dict[str, Tensor]]
RELOADED = [
    (family, kinds, uniform) for family in FLOOR for kinds, uniform in ((("heads", "channels"), True), (KINDS, False))
]


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory: pytest.TempPathFactory) -> Reloaded:
    """Every saved case as one fresh process sees it: texts (layout, errors) and logits by loader, each by case."""
    root = tmp_path_factory.mktemp("reload")
    texts: dict[str, dict[str, str]] = {}
    for family, kinds, uniform in RELOADED:
        name = case_name(family, kinds, uniform)
        try:
            small = cut_model(family, kinds, uniform)
            saved = save(small, root / name, plan=plan_for(family, kinds, uniform))
            texts[name] = {"layout": saved.layout}
        except Exception:
            texts[name] = {"save error": traceback.format_exc()}
    ready = {name: entry["layout"] for name, entry in texts.items() if "layout" in entry}
    (root / "cases.json").write_text(json.dumps({"cases": ready, "tokens": tokens().tolist()}))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)]),
        "HF_MODULES_CACHE": str(root / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "tests.reload", str(root)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    for name, errors in json.loads((root / "errors.json").read_text()).items():
        texts[name].update(errors)
    return texts, load_file(root / "logits.safetensors")


@pytest.mark.parametrize(("family", "kinds", "uniform"), RELOADED, ids=[case_name(*case) for case in RELOADED])
def test_reload_in_a_fresh_process(family: str, kinds: tuple[str, ...], uniform: bool, reloaded: Reloaded) -> None:
    """`resect.load` and transformers both give back the function that was saved, with and without cache."""
    model, graph = dense(family)
    plan = plan_for(family, kinds, uniform)
    name = case_name(family, kinds, uniform)
    texts, logits = reloaded
    errors = [text for step, text in texts[name].items() if step.endswith("error")]
    assert not errors, "\n".join(errors)
    if uniform and family in STOCK:
        assert texts[name]["layout"] == "uniform"
    expected = logits_without_cache(reference(model, graph, plan), tokens())
    for loader in ("resect", "transformers"):
        for cache in ("without cache", "with cache"):
            assert_same_logits(logits[f"{name}/{loader} {cache}"], expected, what=f"{loader}, {cache}")
