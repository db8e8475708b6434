"""Training: exact after being killed, merged as adapted, zeros kept, and alike in one process and in two."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from resect.environment import TORCHRUN, Processes
from resect.errors import DamagedProgress, DataError, EmulatedPrecision, NumericsError, ResectWarning, UsageError
from resect.recovery import Distillation, Mixture, Recovery, recover, recovering, training
from resect.recovery.adapter import attach, linear_layers
from resect.recovery.examples import read_pool
from resect.recovery.heldout import held_out_nats
from resect.recovery.teacher import state_difference
from resect.recovery.training import Watch, last_state, micro_batch, seal
from resect.statistics import divergence, precision, token_losses
from resect.surgery.gather import gather
from tests.models import (
    _NARROW,
    FAMILIES,
    assert_same_logits,
    assert_untouched,
    logits_without_cache,
    random_tokens,
    snapshot,
    tiny,
    tiny_tokenizer,
)
from tests.recipe.dense import write_text

SMALL = Recovery(length=16, batch=4, micro_batch=2, tokens=6 * 64, evaluations=3, held_out=6, learning_rate=3e-3)


@pytest.fixture
def model() -> PreTrainedModel:
    return FAMILIES["llama"]()


def with_(settings: Recovery = SMALL, **changes: Any) -> Recovery:
    return Recovery.model_validate(settings.model_dump() | changes)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(value, weights(b)[name]) for name, value in weights(a).items())


def call(model: PreTrainedModel, text: Path, settings: Recovery = SMALL, **options: Any) -> Any:
    return recover(model, tiny_tokenizer(), data=str(text), settings=settings, **options)


def test_what_is_learnt_lowers_the_held_out_loss_and_leaves_no_trace(model: PreTrainedModel, text: Path) -> None:
    before = snapshot(model)
    found = call(model, text)
    facts = found.facts
    assert facts.held_out_after < facts.held_out_before
    pool = read_pool(str(text), tiny_tokenizer(), SMALL, seed=42)
    assert facts.after[str(text)] == pytest.approx(held_out_nats(model, {"": pool.held_out}, batch=6)[""], rel=1e-5)
    after = snapshot(model)
    assert {name for name, (_, value) in after.tensors.items() if not torch.equal(value, before.tensors[name][1])} == {
        f"{path}.weight" for path, _ in linear_layers(model)
    }
    for part in ("training", "hooks", "attributes", "config", "grad_enabled", "requires_grad"):
        assert getattr(after, part) == getattr(before, part), part
    assert torch.equal(after.random_state, before.random_state)
    assert (facts.trainings[0].steps, facts.trainings[0].tokens) == (6, 384)


@pytest.mark.parametrize(("step", "full"), [(1, False), (2, False), (5, False), (3, True)])
def test_killed_at_any_step_and_resumed_is_as_if_nothing_had_happened(
    step: int, full: bool, model: PreTrainedModel, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = model, copy.deepcopy(model)
    settings = with_(full=full)
    call(whole, text, settings)
    with monkeypatch.context() as patch:
        end = Watch.on_step_end

        def killed(self: Watch, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            end(self, args, state, control, **kwargs)
            if state.global_step == step:
                raise KeyboardInterrupt

        patch.setattr(Watch, "on_step_end", killed)
        with pytest.raises(KeyboardInterrupt):
            call(cut, text, settings, progress=tmp_path / "progress")
    assert bool(last_state(tmp_path / "progress" / "training")) is (step > 2)  # noted after steps 2, 4 and 6
    fresh = FAMILIES["llama"]()
    call(fresh, text, settings, progress=tmp_path / "progress", resume=True)
    assert same(fresh, whole)


def test_a_state_that_was_not_written_whole_is_passed_over(tmp_path: Path) -> None:
    for step in (2, 10, 4):
        state(tmp_path, step, best=2)
    (tmp_path / "checkpoint-10" / "digests.json").unlink()
    (tmp_path / "checkpoint-12").mkdir()
    assert last_state(tmp_path) == str(tmp_path / "checkpoint-4")


@pytest.mark.parametrize(("step", "file"), [(4, "optimizer.pt"), (4, "digests.json"), (2, "optimizer.pt")])
def test_a_state_that_was_damaged_is_passed_over_with_a_word(tmp_path: Path, step: int, file: str) -> None:
    state(tmp_path, 1, best=1)
    state(tmp_path, 2, best=2)
    state(tmp_path, 4, best=2)
    path = tmp_path / f"checkpoint-{step}" / file
    path.write_bytes(path.read_bytes()[:-2] + b"?" + path.read_bytes()[-1:])
    with pytest.warns(DamagedProgress, match="checkpoint-4"):
        assert last_state(tmp_path) == str(tmp_path / f"checkpoint-{2 if step == 4 else 1}")


def state(folder: Path, step: int, *, best: int) -> None:
    """What the Trainer leaves of a step, as far as it is looked into."""
    made = folder / f"checkpoint-{step}"
    made.mkdir()
    (made / "trainer_state.json").write_text(json.dumps({"best_global_step": best}))
    (made / "optimizer.pt").write_bytes(b"moments")
    seal(made, number=0)


def test_what_was_damaged_in_a_recovery_is_made_anew(model: PreTrainedModel, text: Path, tmp_path: Path) -> None:
    first = copy.deepcopy(model)
    call(first, text, progress=tmp_path / "p")
    for file in ("training/done.json", "training/trained.safetensors", "asked.json"):
        path, again = tmp_path / "p" / file, copy.deepcopy(model)
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        with pytest.warns(DamagedProgress, match="made anew"):
            call(again, text, progress=tmp_path / "p", resume=True)
        assert same(again, first)


def test_other_weights_or_another_teacher_are_something_else(model: PreTrainedModel, text: Path, tmp_path: Path) -> None:
    other = copy.deepcopy(model)
    call(copy.deepcopy(model), text, progress=tmp_path / "p")
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1e-3
    with pytest.raises(UsageError, match="something else"):
        call(other, text, progress=tmp_path / "p", resume=True)
    with pytest.raises(UsageError, match="something else"):
        call(model, text, progress=tmp_path / "p", resume=True, teacher=other)


def test_resuming_something_else_is_refused(model: PreTrainedModel, text: Path, tmp_path: Path) -> None:
    call(model, text, progress=tmp_path / "p")
    with pytest.raises(UsageError, match="asked for something else"):
        call(model, text, with_(rank=4), progress=tmp_path / "p", resume=True)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_the_adapter_on_the_pruned_checkpoint_is_the_merged_model(family: str, text: Path, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    model.save_pretrained(tmp_path / "pruned")
    found = call(model, text)
    found.adapter.save(tmp_path / "adapter", base=str(tmp_path / "pruned"))
    base = type(model).from_pretrained(tmp_path / "pruned").eval()
    dense = logits_without_cache(base, random_tokens())
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    logits = logits_without_cache(adapted, random_tokens())
    assert_same_logits(logits, logits_without_cache(model, random_tokens()), tolerance=1e-5)
    assert (logits - dense).abs().max() > 1e-2  # it does something
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 8


def sparse(model: PreTrainedModel) -> list[str]:
    """Makes half of all elements of two layers zero."""
    paths = ["model.layers.0.mlp.up_proj", "model.layers.2.self_attn.q_proj"]
    for path in paths:
        weight: Any = model.get_submodule(path).weight
        weight.data *= torch.rand(weight.shape) < 0.5
    return paths


def experts() -> PreTrainedModel:
    """A mixture whose experts are one tensor for each matrix."""
    return tiny("Qwen3Moe", **_NARROW, num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_experts_that_are_one_tensor_learn_and_are_merged_as_they_were_trained(text: Path, tmp_path: Path) -> None:
    model = experts()
    before = weights(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResectWarning)
        found = call(model, text)
    moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    fused = {f"model.layers.{layer}.mlp.experts.{part}" for layer in (0, 1) for part in ("gate_up_proj", "down_proj")}
    assert fused <= moved
    blocks = {name: value.numel() for name, value in before.items() if ".layers." in name}
    share = sum(size for name, size in blocks.items() if name in moved) / sum(blocks.values())
    assert found.facts.reached == pytest.approx(share)
    assert found.facts.held_out_after < found.facts.held_out_before
    experts().save_pretrained(tmp_path / "pruned")
    found.adapter.save(tmp_path / "adapter", base=str(tmp_path / "pruned"))
    base = type(model).from_pretrained(tmp_path / "pruned").eval()
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    logits = logits_without_cache(adapted, random_tokens())
    assert_same_logits(logits, logits_without_cache(model, random_tokens()), tolerance=1e-5)


def test_what_low_rank_terms_do_not_reach_is_told_with_its_share(model: PreTrainedModel, text: Path) -> None:
    layer: Any = model.get_submodule("model.layers.1.mlp")
    layer.table = nn.Parameter(torch.zeros(90, 90))
    with pytest.warns(ResectWarning, match=r"mlp\.table.*% of the parameters in blocks.*do not learn"):
        found = call(model, text)
    assert found.facts.reached < 0.9


@pytest.mark.parametrize("full", [False, True])
def test_zeros_of_a_pattern_stay_and_all_else_moves(full: bool, model: PreTrainedModel, text: Path) -> None:
    paths = sparse(model)
    before = weights(model)
    call(model, text, with_(full=full, weight_decay=0.1 if full else 0.0), keep_zeros=paths)
    for path in paths:
        old, new = before[f"{path}.weight"], weights(model)[f"{path}.weight"]
        assert torch.equal(new == 0, old == 0)
        assert (new != old)[old != 0].float().mean() > 0.99


def test_a_pattern_is_trained_as_it_is_merged(model: PreTrainedModel) -> None:
    paths = sparse(model)
    adapted = attach(model, SMALL, keep_zeros=paths, seed=0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    adapted.eval()
    logits = logits_without_cache(adapted, random_tokens())
    adapted.merge_and_unload()
    assert_same_logits(logits_without_cache(model, random_tokens()), logits, tolerance=1e-5)
    assert (model.get_submodule(paths[0]).weight == 0).float().mean() > 0.4  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gathered_layers_are_trained_as_they_are_merged(family: str, text: Path) -> None:
    model = FAMILIES[family]()
    path = {"llama": "model.layers.1.mlp.down_proj", "gpt2": "transformer.h.1.mlp.c_fc"}[family]
    gather(model, {path: (torch.arange(0, 40, 2), torch.arange(1, 30))})
    twin = copy.deepcopy(model)
    adapted = attach(twin, SMALL, seed=0)
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    assert any(path in name for name, parameter in adapted.named_parameters() if parameter.requires_grad)
    logits = logits_without_cache(adapted.eval(), random_tokens())
    adapted.merge_and_unload()
    assert_same_logits(logits_without_cache(twin, random_tokens()), logits, tolerance=1e-5)
    before = weights(model)
    found = call(model, text)
    assert found.facts.held_out_after < found.facts.held_out_before
    assert not torch.equal(model.get_submodule(path).weight, before[f"{path}.weight"])  # type: ignore[arg-type]


def test_the_best_state_is_the_result(
    model: PreTrainedModel, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = iter([9.0, 4.0, 2.0, 3.0, 2.0])
    for module in (training, recovering):
        monkeypatch.setattr(module, "overall", lambda nats, held_out: next(measured))
    found = call(model, text, with_(rank=2), progress=tmp_path / "p")
    assert found.facts.trainings[0].held_out == [(2, 4.0), (4, 2.0), (6, 3.0)]
    assert found.facts.trainings[0].best_step == 4
    best = load_file(tmp_path / "p" / "training" / "checkpoint-4" / training.WEIGHTS)
    for name, tensor in found.adapter.tensors.items():
        assert torch.equal(tensor, best[name.replace(".weight", ".default.weight")])
    measured = iter([9.0, 4.0, 3.0, 2.0, 2.0])
    last = call(FAMILIES["llama"](), text, with_(rank=2))
    assert not any(torch.equal(tensor, last.adapter.tensors[name]) for name, tensor in found.adapter.tensors.items())


def test_differences_of_states_against_a_float64_twin() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(5, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    difference = ((student - teacher) ** 2).sum(-1) / 11 / ((teacher - teacher.mean()) ** 2).sum() * (5 * 11 - 1)
    torch.testing.assert_close(state_difference(student, teacher).double(), difference, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The held-out loss did not fall")  # of the text, which the teacher does not know
def test_a_student_of_a_teacher_alone_comes_closer_to_it(model: PreTrainedModel, text: Path) -> None:
    student = copy.deepcopy(model)
    with torch.no_grad():
        for _, layer in linear_layers(student):
            layer.weight += 0.3 * layer.weight.std() * torch.randn_like(layer.weight)  # type: ignore[operator,arg-type]
    pool = read_pool(str(text), tiny_tokenizer(), SMALL, seed=42)
    tokens = torch.stack([example.tokens for example in pool.held_out])

    def distance() -> float:
        logits = logits_without_cache(student, tokens), logits_without_cache(model, tokens)
        return float(divergence(*(one.flatten(0, 1) for one in logits), temperature=1.0).mean())

    before, teacher = distance(), weights(model)
    only = Distillation(weight=1, temperature=1, hidden=0.1).model_dump()
    found = call(student, text, with_(distillation=only, tokens=24 * 64, full=True), teacher=model)
    assert distance() < 0.8 * before
    assert found.facts.dense is not None
    assert all(torch.equal(value, teacher[name]) for name, value in weights(model).items())


def test_teachers_that_do_not_fit(model: PreTrainedModel, text: Path) -> None:
    other = FAMILIES["llama"]()
    other.resize_token_embeddings(90)
    with pytest.raises(UsageError, match="teacher has 90 tokens in its vocabulary, the model 101.*Name the dense"):
        call(model, text, teacher=other)
    with pytest.raises(UsageError, match="states are 48 wide, the model's 60.*hidden=0"):
        call(model, text, with_(distillation={"hidden": 1.0}), teacher=FAMILIES["qwen2"]())


@pytest.mark.parametrize("full", [False, True])
def test_a_loss_that_is_not_a_number_stops_and_a_lower_rate_goes_on(
    full: bool, model: PreTrainedModel, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = weights(model)
    steps = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(training, "token_losses", lambda *a, **b: token_losses(*a, **b) * (1 if next(steps) < 9 else float("nan")))
        with pytest.raises(NumericsError, match=r"loss is nan in step 5 of 6.*last good state is .*checkpoint-4.*learning_rate"):
            call(model, text, with_(full=full), progress=tmp_path / "p")
    assert all(value.isfinite().all() for value in weights(model).values())
    if not full:
        assert all(torch.equal(value, whole[name]) for name, value in weights(model).items())
    fresh = FAMILIES["llama"]()
    found = call(fresh, text, with_(full=full, learning_rate=1e-4), progress=tmp_path / "p", resume=True)
    assert [step for step, _ in found.facts.trainings[0].losses] == [1, 2, 3, 4, 5, 6]
    assert found.facts.held_out_after < found.facts.held_out_before


def test_an_infinite_gradient_reaches_no_weight(model: PreTrainedModel, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Explodes(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * float("inf")

    monkeypatch.setattr(training, "token_losses", lambda logits, *a, **b: token_losses(Explodes.apply(logits), *a, **b))
    before = snapshot(model)
    with pytest.raises(NumericsError, match="gradient is nan in step 1 of 6. No state was noted yet"):
        call(model, text)
    assert_untouched(model, before)


def test_what_cannot_be_meant(model: PreTrainedModel, text: Path) -> None:
    with pytest.raises(UsageError, match="no teacher was given"):
        call(model, text, with_(mixture={"kind": "dynamic"}))
    with pytest.raises(UsageError, match="80 positions"):
        call(FAMILIES["gpt2"](), text, with_(length=100))
    with pytest.raises(UsageError, match="no data"):
        recover(model, tiny_tokenizer(), data=[])
    with pytest.raises(DataError, match="no file"):
        call(model, Path("nowhere.txt"))


def test_batches_are_divided_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    assert micro_batch(Recovery(batch=6, micro_batch=4)) == 3
    for name, value in zip(TORCHRUN, ("0", "4", "0", "localhost", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    assert micro_batch(Recovery(batch=8, micro_batch=4)) == 2
    with pytest.raises(UsageError, match="batch = 6 cannot be divided among 4 processes"):
        micro_batch(Recovery(batch=6))


def test_checkpointing_computes_the_same(model: PreTrainedModel, text: Path) -> None:
    other = copy.deepcopy(model)
    call(model, text)
    before = snapshot(other)
    call(other, text, with_(checkpointing=True))
    for name, value in weights(model).items():
        torch.testing.assert_close(value, weights(other)[name], rtol=1e-4, atol=1e-5)
    after = snapshot(other)
    assert (after.hooks, after.config) == (before.hooks, before.config)
    assert not other.is_activation_checkpointing


def test_bfloat16_computing_leaves_the_model_in_float32(
    model: PreTrainedModel, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: False)
    with pytest.warns(EmulatedPrecision) as heard:
        found = call(model, text, with_(bf16=True, full=True))
    assert [one.category for one in heard] == [EmulatedPrecision]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert "forward" not in vars(model)
    assert found.facts.held_out_after < found.facts.held_out_before


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("bf16", [True, False])
def test_teacher_and_measuring_compute_as_training_does(model: PreTrainedModel, text: Path, bf16: bool, full: bool) -> None:
    teacher, seen = copy.deepcopy(model), {"model": set[torch.dtype](), "teacher": set[torch.dtype]()}
    for name, one in (("model", model), ("teacher", teacher)):
        layer = one.get_submodule("model.layers.0.mlp.down_proj")
        layer.register_forward_hook(lambda module, given, output, name=name: seen[name].add(output.dtype))
    call(model, text, with_(bf16=bf16, full=full, tokens=64), teacher=teacher)
    assert seen["model"] == seen["teacher"] == {torch.bfloat16 if bf16 else torch.float32}


def test_a_teacher_that_weighs_nothing_is_only_measured_against(model: PreTrainedModel, text: Path) -> None:
    alone, teacher, calls = copy.deepcopy(model), FAMILIES["llama"](), []
    call(alone, text)
    teacher.register_forward_hook(lambda module, given, output: calls.append(module.training))
    found = call(model, text, with_(distillation={"weight": 0.0}), teacher=teacher)
    assert found.facts.dense is not None
    assert len(calls) == 3  # six held-out examples, two at a time
    assert same(model, alone)


def bare_training(settings: Recovery, text: Path, folder: Path) -> training.Training:
    model: nn.Module = FAMILIES["llama"]()
    if not settings.full:
        model = attach(cast(PreTrainedModel, model), settings, keep_zeros=(), seed=1)
    held_out = {"": read_pool(str(text), tiny_tokenizer(), settings, seed=42).held_out}
    return training.Training(model=model, held_out=held_out, settings=settings, folder=folder, resumes=True)


@pytest.mark.parametrize("full", [True, False])
def test_trainings_under_one_schedule_are_one_training(full: bool, text: Path, tmp_path: Path) -> None:
    settings = with_(full=full, dropout=0.0)  # what dropout draws begins anew in each
    examples = read_pool(str(text), tiny_tokenizer(), settings, seed=42).train[:24]
    whole = bare_training(settings, text, tmp_path / "whole")
    parts, again = (bare_training(settings, text, tmp_path / "parts") for _ in range(2))
    whole("all", examples, evaluations=1)
    parts("a", examples[:8], evaluations=1, in_all=6)
    assert last_state(parts.folder / "a")
    again("a", examples[:8], evaluations=1, in_all=6)  # is done, and read
    again("b", examples[8:], evaluations=1, after="a", done=2, in_all=6)
    assert same(again.model, whole.model)
    assert not last_state(parts.folder / "a")  # nobody needs it any more
    parts("b", examples[8:], evaluations=1, after="a", done=2, in_all=6)
    assert same(parts.model, whole.model)


def test_a_new_schedule_keeps_the_optimizer(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, seen = with_(full=True), []
    examples = read_pool(str(text), tiny_tokenizer(), settings, seed=42).train[:12]
    one = bare_training(settings, text, tmp_path)
    one("a", examples, evaluations=1)
    end = Watch.on_step_end

    def watched(self: Watch, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        end(self, args, state, control, **kwargs)
        optimizer = kwargs["optimizer"]
        steps = {int(moments["step"]) for moments in optimizer.state.values()}
        seen.append((steps, optimizer.param_groups[0]["lr"], weights(one.model)))

    monkeypatch.setattr(Watch, "on_step_end", watched)
    before = weights(one.model)
    one("b", examples[:8], evaluations=1, after="a")
    assert [steps for steps, _, _ in seen] == [{4}, {5}]
    assert [rate for _, rate, _ in seen] == pytest.approx([settings.rate / 2, 0.0])  # a cosine of two steps
    moved = max(float((seen[0][2][name] - value).abs().max()) for name, value in before.items())
    assert moved == pytest.approx(settings.rate, rel=0.5)  # not the rate of 0 that the first training ended with


@pytest.fixture
def mixed(model: PreTrainedModel, text: Path, tmp_path: Path) -> dict[str, Any]:
    """A dynamic mixture of two texts, on the first of which the teacher is far ahead, and instructions."""
    other = tmp_path / "other.txt"
    other.write_text("".join(chr(97 + number * number % 26) for number in range(600)))
    rows = [{"instruction": f"Count to {number}.", "output": "1 2 3"} for number in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}{% endfor %}{{ '[a]' if add_generation_prompt }}"
    )
    teacher = copy.deepcopy(model)
    call(teacher, text, with_(tokens=60 * 64, full=True))
    mixture = Mixture(kind="dynamic", rounds=3, steps=2).model_dump()
    settings = with_(mixture=mixture, length=80, template="chat", tokens=5_000, distillation={"weight": 0})
    data = [str(text), str(other), str(tmp_path / "rows.jsonl")]
    return {"tokenizer": tokenizer, "data": data, "settings": settings, "teacher": teacher}


def test_dynamic_recovery_says_how_every_gap_moved(model: PreTrainedModel, mixed: dict[str, Any], tmp_path: Path) -> None:
    sources = mixed["data"]
    found = recover(copy.deepcopy(model), progress=tmp_path / "p", **mixed)
    stages = [(one.stage, one.number) for one in found.facts.rounds]
    assert stages[0] == ("text", 0)
    assert ("instructions", 0) in stages
    first, second = found.facts.rounds[1:3]
    assert first.weights == {sources[0]: 0.5, sources[1]: 0.5}
    assert second.weights[sources[0]] != second.weights[sources[1]]
    assert first.gaps[sources[0]] < found.facts.rounds[0].gaps[sources[0]]
    again = recover(copy.deepcopy(model), progress=tmp_path / "p", resume=True, **mixed)
    assert again.facts.rounds == found.facts.rounds
    assert same(again.model, found.model)


@pytest.mark.parametrize("first", [0, 2])
def test_instructions_after_text_learn_at_a_lower_rate(
    model: PreTrainedModel, mixed: dict[str, Any], first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, rates = Watch.on_train_begin, dict[str, float]()

    def watched(self: Watch, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        begin(self, args, state, control, **kwargs)
        rates[self.name] = kwargs["optimizer"].param_groups[0]["initial_lr"]

    monkeypatch.setattr(Watch, "on_train_begin", watched)
    recover(model, **mixed | {"data": mixed["data"][first:]})
    text_rates = {rate for name, rate in rates.items() if name.startswith("text")}
    instruction_rates = {rate for name, rate in rates.items() if name.startswith("instructions")}
    whole = mixed["settings"].rate
    assert (text_rates, instruction_rates) == (({whole}, {0.3 * whole}) if first == 0 else (set(), {whole}))


@pytest.mark.parametrize("first", [True, False])
def test_of_several_processes_the_first_warns(
    first: bool, model: PreTrainedModel, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovering, "processes", lambda: Processes(2, 1 - first, 0))
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: False)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always", ResectWarning)
        call(model, text, with_(bf16=True, learning_rate=1e-30))
    ours = [one.category for one in heard if issubclass(one.category, ResectWarning)]
    assert ours == [EmulatedPrecision, ResectWarning] * first


def test_two_processes_lose_what_one_does(text: Path, tmp_path: Path) -> None:
    settings = Recovery(
        length=40, batch=4, micro_batch=2, epochs=1, evaluations=2, held_out=4, learning_rate=3e-3, dropout=0
    )
    one = call(FAMILIES["llama"](), text, settings, progress=tmp_path / "p-one").facts
    script = """
import json, os, sys
from resect.recovery import Recovery, recover
from tests.models import FAMILIES, tiny_tokenizer
text, settings, progress, output = sys.argv[1:]
settings = Recovery.model_validate_json(settings)
found = recover(FAMILIES["llama"](), tiny_tokenizer(), data=[text], settings=settings, progress=progress)
if os.environ["RANK"] == "0":
    training = found.facts.trainings[0]
    json.dump([found.facts.processes, training.losses, training.held_out], open(output, "w"))
"""
    file, output = tmp_path / "once.py", tmp_path / "two.json"
    file.write_text(script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [str(file), str(text), settings.model_dump_json(), str(tmp_path / "p-two"), str(output)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(["src", ".", *sys.path]), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*launch, *words], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, "\n".join(line for line in run.stderr.splitlines() if "rank0" in line) or run.stderr
    processes, losses, held_out = json.loads(output.read_text())
    assert (one.processes, processes) == (1, 2)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(one.trainings[0].losses), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.tensor(held_out), torch.tensor(one.trainings[0].held_out), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("texts") / "river.txt")
