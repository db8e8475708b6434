"""resect and Torch-Pruning side by side on twenty architectures: what each finds, what that takes, what pruning 25 % leaves.

    pip install --no-deps torch-pruning==1.6.1
    python benchmarks/side_by_side.py            # all, into benchmarks/results/side_by_side.{json,md}

Every tool and architecture gets a process of its own, in float64, on small models with random weights. Building the dependency
graph is timed after one build that is thrown away (median of three); memory is the peak of the process in the build less what it
held before. *groups* are those that either tool offers, each counted its own way, without
whole modules and rows of the vocabulary, which only resect offers. *covered* is the share of parameters
in tensors that some group slices.

Torch-Pruning is set up as in its own example for language models: magnitude importance, `num_heads` for the projections of
queries, keys and values, whole heads pruned, `out_channel_groups` for fused gates, the head ignored, and the numbers of heads and
widths in the modules brought up to date afterwards. Where pruning heads breaks, it is tried without heads too. resect removes the
quarter of every group with the smallest weights.

Two rounds each. *all*: every group, the hidden width included; says whether the pruned model runs. *inside*: only groups over
which no LayerNorm or RMSNorm runs; the pruned model is held against the dense one with the removed slices at zero, which are read
off the weights themselves and not off either tool's record. The figure is the largest difference of outputs as a share of their
standard deviation. The number before it is the share of parameters that went.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from record import apart, environment, peak_memory, reset_peak_memory, write
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
SHARE = 0.25
"""Of every group, what goes."""
LANGUAGE = (
    *("llama", "gpt2", "gpt_neox", "falcon", "phi3", "gemma2", "bloom", "opt"),
    *("mixtral", "deepseek_v3", "mamba2", "qwen3_next", "recurrent_gemma"),
)
QUERIES, KEYS, VALUES = ("q_proj", "query", "q"), ("k_proj", "key", "k"), ("v_proj", "value", "v")
FUSED = ("qkv_proj", "query_key_value", "c_attn")
HEADS = ("num_heads", "num_attention_heads", "n_heads")
WIDTHS = ("hidden_size", "embed_dim", "all_head_size", "inner_dim", "split_size")


@dataclass
class Subject:
    """A network, what it is called with, and the layer whose outputs stay."""

    model: nn.Module
    inputs: Any
    head: nn.Module

    def outputs(self, model: nn.Module) -> Tensor:
        """What a network puts out for the inputs."""
        found = model(**self.inputs) if isinstance(self.inputs, dict) else model(*self.inputs)
        return found if isinstance(found, Tensor) else found.logits


# -- the networks ------------------------------------------------------------------------------------------------------


class Beside(nn.Module):
    """What is computed beside the stream, added to it or put at its end."""

    def __init__(self, body: nn.Module, *, added: bool = True) -> None:
        super().__init__()
        self.body, self.added = body, added

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] to the same, or to more channels."""
        return x + self.body(x) if self.added else torch.cat([x, self.body(x)], 1)


def step(into: int, out: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    convolution = nn.Conv2d(into, out, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU())


def classifier(channels: int, *parts: nn.Module) -> nn.Sequential:
    """Parts, then ten classes."""
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def residual() -> nn.Module:
    """Two stages of residual blocks."""
    blocks = [Beside(nn.Sequential(step(width, width), step(width, width))) for width in (32, 32, 64, 64)]
    return classifier(64, step(3, 32), *blocks[:2], step(32, 64, stride=2), *blocks[2:])


def depthwise() -> nn.Module:
    """Inverted bottlenecks with depthwise convolutions."""
    inner = [nn.Sequential(step(24, 72, 1), step(72, 72, groups=72), nn.Conv2d(72, 24, 1), nn.BatchNorm2d(24)) for _ in range(3)]
    return classifier(48, step(3, 24, stride=2), *map(Beside, inner), step(24, 48, 1))


def concatenating() -> nn.Module:
    """Every layer sees all channels before it."""
    layers = [Beside(step(24 + 12 * number, 12), added=False) for number in range(4)]
    return classifier(72, step(3, 24), *layers)


def language(model_type: str) -> Subject:
    """A small causal language model."""
    from tests.zoo.shrink import build

    model = build(model_type, device="cpu")
    model.config.use_cache = False
    model.set_experts_implementation("eager")  # type: ignore[operator]
    return Subject(model, {"input_ids": torch.arange(3, 25).view(2, 11)}, model.get_output_embeddings())


def other(name: str) -> Subject:
    """An encoder, an encoder-decoder, or a network that looks at images."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        SwinConfig,
        SwinForImageClassification,
        T5Config,
        T5ForConditionalGeneration,
        ViTConfig,
        ViTForImageClassification,
    )

    tokens, image = torch.arange(3, 25).view(2, 11), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 200}
    if name == "t5":
        model = T5ForConditionalGeneration(
            T5Config(vocab_size=101, d_model=128, d_kv=16, d_ff=200, num_layers=3, num_heads=8, use_cache=False)
        )
        return Subject(model, {"input_ids": tokens, "decoder_input_ids": tokens[:, :7]}, model.lm_head)
    if name == "bert":
        bert = BertForSequenceClassification(BertConfig(vocab_size=101, **sizes))
        return Subject(bert, {"input_ids": tokens}, bert.classifier)
    if name == "vit":
        vit = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **sizes))
        return Subject(vit, {"pixel_values": image}, vit.classifier)
    if name == "swin":
        config = SwinConfig(image_size=32, patch_size=2, embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=4)
        swin = SwinForImageClassification(config)
        return Subject(swin, {"pixel_values": image}, swin.classifier)
    network = {"residual CNN": residual, "depthwise CNN": depthwise, "concatenating CNN": concatenating}[name]()
    return Subject(network, (image,), list(network.children())[-1])


ARCHITECTURES = (*LANGUAGE, "t5", "bert", "vit", "swin", "residual CNN", "depthwise CNN", "concatenating CNN")


def subject(name: str) -> Subject:
    """One architecture in float64 and evaluation mode, every number of it random."""
    torch.manual_seed(0)
    found = language(name) if name in LANGUAGE else other(name)
    found.model.double().eval()
    with torch.no_grad():
        for parameter in found.model.parameters():
            parameter.copy_(parameter.nan_to_num(0.0) + 0.05 * torch.randn_like(parameter))
        for buffer_name, buffer in found.model.named_buffers():
            if buffer_name.endswith(("running_mean", "running_var")):
                buffer.uniform_(0.5, 1.5)
    return found


# -- what both are held against ----------------------------------------------------------------------------------------


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by every name they have."""
    return dict(model.named_parameters(remove_duplicate=False))


def is_layer_norm(module: nn.Module) -> bool:
    """Whether a module takes statistics over what a pruner may narrow."""
    return "norm" in type(module).__name__.lower() and "BatchNorm" not in type(module).__name__


def kept(dense: Tensor, small: Tensor) -> list[Tensor]:
    """The positions of every axis of a tensor that a smaller one still has, found by the values: all are different."""
    place = {value: at for at, value in enumerate(dense.flatten().tolist())}
    corner = [0] * small.ndim
    found = []
    for axis in range(small.ndim):
        fibre = small[tuple(slice(None) if other == axis else at for other, at in enumerate(corner))]
        places = torch.tensor([place[value] for value in fibre.tolist()])
        found.append(torch.stack(torch.unravel_index(places, dense.shape))[axis])
    if not torch.equal(dense[torch.meshgrid(*found, indexing="ij")], small):
        raise ValueError("what is left of a tensor is no part of it")
    return found


def difference(task: Subject, pruned: nn.Module) -> float:
    """How far a pruned network is from the dense one with the removed slices at zero."""
    masked = copy.deepcopy(task.model)
    smaller = tensors(pruned)
    with torch.no_grad():
        for name, parameter in tensors(masked).items():
            if parameter.shape != smaller[name].shape:
                positions = kept(tensors(task.model)[name].detach(), smaller[name].detach())
                for axis, keep in enumerate(positions):
                    lost = torch.ones(parameter.shape[axis], dtype=torch.bool)
                    lost[keep] = False
                    parameter.index_fill_(axis, lost.nonzero().flatten(), 0.0)
        expected, found = task.outputs(masked), task.outputs(pruned)
    return float((expected - found).abs().max() / expected.std())


def attempt(work: Callable[[], str]) -> str:
    """What came of a piece of work, or what stopped it."""
    try:
        return work()
    except Exception as problem:
        return f"breaks: {type(problem).__name__}: {' '.join(str(problem).split())[:110]}"


def parameter_count(model: nn.Module) -> int:
    """Parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def outcome(task: Subject, pruned: nn.Module, *, inside: bool) -> str:
    """What is left of a network: its parameters, whether it runs, and how far it is from the masked one."""
    before, after = parameter_count(task.model), parameter_count(pruned)
    if before == after:
        return "nothing removed"
    with torch.no_grad():
        task.outputs(pruned)
    gone = f"-{1 - after / before:.1%}"
    return f"{gone}, {difference(task, pruned):.0e}" if inside else f"{gone}, runs"


# -- the tools ---------------------------------------------------------------------------------------------------------


def built(build: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What a build gives, its seconds (the median of three after one), and its peak memory."""
    build()
    reset_peak_memory("cpu")
    held = peak_memory("cpu")
    found, seconds = None, []
    for _ in range(3):
        start = time.perf_counter()
        found = build()
        seconds.append(time.perf_counter() - start)
        if len(seconds) == 1:
            needed = 1024 * (peak_memory("cpu") - held)
    return found, {"seconds": median(seconds), "MiB": needed}


def with_resect(task: Subject) -> dict[str, Any]:
    """resect's row."""
    import resect
    from resect.graph import DEPTH, VOCABULARY
    from resect.plan import Kept, Plan

    graph, cost = built(lambda: resect.trace(task.model, task.inputs))
    sliced = [group for group in graph.groups if group.kind not in (*DEPTH, VOCABULARY)]
    weights = dict(task.model.named_parameters())
    covered = {member.parameter for group in sliced for member in group.members if member.parameter in weights}

    def smallest(group: Any) -> Kept:
        score = torch.zeros(group.units, dtype=torch.float64)
        for member in graph.weights(group):
            squares = weights[member.parameter].detach().square()
            score += squares.movedim(member.axis, 0).reshape(squares.shape[member.axis], -1).sum(1)[member.index].sum(1)
        stay = max(group.units - int(SHARE * group.units), group.least)
        keep = tuple(sorted(score.topk(stay).indices.tolist()))
        return Kept(kind=group.kind, layer=group.layer, units=group.units, keep=keep)

    def prune(groups: Iterable[Any], inside: bool) -> str:
        plan = Plan(groups={group.name: smallest(group) for group in groups})
        return outcome(task, resect.cut(copy.deepcopy(task.model), plan, graph), inside=inside)

    narrow = [group for group in sliced if not any(is_layer_norm(task.model.get_submodule(name)) for name in group.mixed)]
    narrow = [group for group in narrow if not group.rivals]  # a masked expert is not one with zero weights
    return {
        "groups": len(sliced),
        **cost,
        "covered": sum(weights[name].numel() for name in covered) / parameter_count(task.model),
        "all": attempt(lambda: prune(sliced, inside=False)),
        "inside": attempt(lambda: prune(narrow, inside=True)),
    }


def projections(model: nn.Module) -> dict[nn.Module, tuple[nn.Linear, list[nn.Linear]]]:
    """The attention modules whose projections are linear layers of their own: that of the queries, those of keys and values."""
    found = {}
    for module in model.modules():
        layers = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
        parts = [[layers[name] for name in names if name in layers] for names in (QUERIES, KEYS, VALUES)]
        if all(parts):
            found[module] = (parts[0][0], [parts[1][0], parts[2][0]])
        elif fused := [layers[name] for name in FUSED if name in layers]:
            found[module] = (fused[0], [])
    return found


def attention_heads(module: nn.Module) -> int:
    """The number of heads as a module, or its configuration, counts them."""
    for place in (module, getattr(module, "config", None)):
        for name in HEADS:
            if isinstance(getattr(place, name, None), int):
                return int(getattr(place, name))
    return 1


def with_torch_pruning(task: Subject) -> dict[str, Any]:
    """Torch-Pruning's row."""
    import torch_pruning as tp

    transform = lambda found: found if isinstance(found, Tensor) else found.logits  # noqa: E731

    def build() -> Any:
        return tp.DependencyGraph().build_dependency(task.model, task.inputs, output_transform=transform, verbose=False)

    fresh = copy.deepcopy(task)  # building runs the network, and some keep what they computed
    graph, cost = built(build)
    groups = list(graph.get_all_groups(ignored_layers=[task.head]))
    covered = {}
    for group in groups:
        for dependency, _ in group:
            module = dependency.target.module
            owned = [module] if isinstance(module, nn.Parameter) else list(module.parameters(recurse=False))
            covered.update({id(parameter): parameter.numel() for parameter in owned if module is not task.head})
    return {
        "groups": len(groups),
        **cost,
        "covered": sum(covered.values()) / parameter_count(task.model),
        "all": tp_attempt(fresh, transform, inside=False),
        "inside": tp_attempt(fresh, transform, inside=True),
    }


def tp_attempt(task: Subject, transform: Callable[[Any], Tensor], *, inside: bool) -> str:
    """What pruning gives; where pruning heads breaks, what it gives without."""
    found = attempt(lambda: tp_prune(task, transform, inside=inside, share=SHARE))
    if not found.startswith("breaks"):
        return found
    without = attempt(lambda: tp_prune(task, transform, inside=inside, share=0.0))
    return f"{found}; no heads pruned: {without}"


def tp_prune(task: Subject, transform: Callable[[Any], Tensor], *, inside: bool, share: float) -> str:
    """A copy pruned as in Torch-Pruning's example for language models."""
    import torch_pruning as tp

    pruned = copy.deepcopy(task)
    model, attention = pruned.model, projections(pruned.model)
    heads, widths = {}, {}
    for module, (queries, others) in attention.items():
        widths[module] = queries.out_features // attention_heads(module)
        heads |= {layer: max(layer.out_features // widths[module], 1) for layer in others}
        heads[queries] = attention_heads(module)
    gates = {child: 2 for module in model.modules() for name, child in module.named_children() if name == "gate_up_proj"}
    pruner = tp.pruner.BasePruner(
        model,
        pruned.inputs,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=SHARE,
        ignored_layers=[pruned.head],
        num_heads=heads,
        prune_num_heads=share > 0,
        prune_head_dims=False,
        head_pruning_ratio=share,
        out_channel_groups=gates,
        output_transform=transform,
    )
    for group in pruner.step(interactive=True):
        modules = [dependency.target.module for dependency, _ in group]
        if not (inside and any(isinstance(module, nn.Module) and is_layer_norm(module) for module in modules)):
            group.prune()
    follow(attention, widths)
    return outcome(task, model, inside=inside)


def follow(attention: dict[nn.Module, tuple[nn.Linear, list[nn.Linear]]], widths: dict[nn.Module, int]) -> None:
    """Brings the numbers of heads and widths in attention modules up to date, as Torch-Pruning's examples do by hand."""
    for module, (queries, others) in attention.items():
        before = attention_heads(module)
        fused = 1 if others else max(queries.out_features // (widths[module] * before), 1)
        now = queries.out_features // (widths[module] * fused)
        for name in HEADS:
            if getattr(module, name, None) == before:
                setattr(module, name, now)
        for name in WIDTHS:
            if getattr(module, name, None) == before * widths[module]:
                setattr(module, name, now * widths[module])
        if others and hasattr(module, "num_key_value_groups"):
            module.num_key_value_groups = max(now // max(others[0].out_features // widths[module], 1), 1)


TOOLS = {"resect": with_resect, "torch-pruning": with_torch_pruning}


def one(tool: str, name: str) -> dict[str, Any]:
    """One tool's row of one architecture."""
    task = subject(name)
    return {"parameters": parameter_count(task.model), **TOOLS[tool](task)}


def run(tool: str, name: str, limit: float) -> dict[str, Any]:
    """The same from a process of its own."""
    try:
        found: dict[str, Any] = apart(one, tool, name, limit=limit)
    except TimeoutError:
        found = {"all": f"not done after {limit:.0f} s"}
    except Exception as problem:
        found = {"all": f"no graph: {type(problem).__name__}: {' '.join(str(problem).split())[:110]}"}
    return {"architecture": name, "tool": tool, **found}


def main() -> None:
    """Runs the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES)
    parser.add_argument("--limit", type=float, default=600, help="seconds for one process")
    asked = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    todo = [(tool, name) for name in asked.architectures for tool in TOOLS]
    rows = []
    for tool, name in tqdm(todo):
        rows.append(run(tool, name, asked.limit))
        tqdm.write(str(rows[-1]))
    about = {"share": SHARE, "limit": asked.limit, "torch-pruning": version("torch-pruning"), **environment()}
    write("side_by_side", about, rows)


if __name__ == "__main__":
    main()
