"""Networks that are no causal language models, pruned, saved and loaded again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

import resect
from resect.checkpoint import load_into, save, verify
from resect.errors import CheckpointError, OtherLayout, UsageError
from resect.methods import Result
from resect.surgery import inputs_like, outputs_of
from tests.models import FAMILIES

IDS = torch.randint(5, 60, (2, 7))
SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT: dict[str, Any] = {**SMALL, "vocab_size": 64, "num_key_value_heads": 2, "pad_token_id": 0}
REWARD: dict[str, Any] = {**TEXT, "num_labels": 1}
WHISPER: dict[str, Any] = {
    "vocab_size": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_mel_bins": 8,
    "max_source_positions": 15,
    "max_target_positions": 16,
    "d_model": 32,
    "pad_token_id": 0,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5: dict[str, Any] = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}


def made(name: str) -> tuple[PreTrainedModel, Any]:
    """A network and what it is called with; None for tokens."""
    torch.manual_seed(0)
    if name == "whisper":
        sound = {"input_features": torch.randn(2, 8, 30), "decoder_input_ids": IDS, "use_cache": False}
        return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**WHISPER)).eval(), sound
    if name == "t5":
        texts = {"input_ids": IDS, "decoder_input_ids": IDS, "use_cache": False}
        return transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)).eval(), texts
    if name == "vit":
        config = transformers.ViTConfig(**SMALL, image_size=32, patch_size=8)
        return transformers.ViTForImageClassification(config).eval(), {"pixel_values": torch.randn(2, 3, 32, 32)}
    if name == "embedder":
        return transformers.Qwen3Model(transformers.Qwen3Config(**TEXT, head_dim=8)).eval(), None
    assert name == "reward"
    judge = transformers.LlamaConfig(**REWARD)
    return transformers.LlamaForSequenceClassification(judge).eval(), {"input_ids": IDS}


def pruned(model: nn.Module, inputs: Any, **options: Any) -> Result:
    settings = {"criterion": "l2", "kinds": ["heads", "channels"]}
    return resect.prune(model, keep=0.8, of="model", inputs=inputs, settings=settings, **{"layout": "per-layer", **options})


AUTO = {
    "whisper": "AutoModelForSpeechSeq2Seq",
    "t5": "AutoModelForSeq2SeqLM",
    "vit": "AutoModelForImageClassification",
    "embedder": "AutoModel",
    "reward": "AutoModelForSequenceClassification",
}


@pytest.mark.parametrize("name", AUTO)
def test_a_per_layer_network_loads_through_its_own_auto_class(name: str, tmp_path: Path) -> None:
    model, inputs = made(name)
    dense = type(model).__name__
    whole = resect.trace(model, inputs).of_kind("channels")[0].name  # so that no two blocks are alike
    result = pruned(model, inputs, protect=whole)
    assert result.plan.removed()
    saved = save(model, tmp_path / "out", plan=result.plan)
    assert saved.layout == "per-layer"
    loaded = getattr(transformers, AUTO[name]).from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(loaded).__name__ == f"Resect{dense}"
    example = inputs_like(model.resect_example, model, 3)  # type: ignore[arg-type]
    with torch.no_grad():
        torch.testing.assert_close(outputs_of(loaded, example), outputs_of(model, example))


def test_the_auto_map_has_every_class_of_the_dense_model(tmp_path: Path) -> None:
    """People train reward models and classifiers on pruned language models, and take their hidden states."""
    model = FAMILIES["llama"]()
    result = resect.prune(model, keep=0.7, layout="per-layer", settings={"criterion": "l2"})
    save(model, tmp_path / "out", plan=result.plan)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    names = ("AutoModel", "AutoModelForSequenceClassification", "AutoModelForTokenClassification")
    assert {*names, "AutoModelForQuestionAnswering", "AutoModelForCausalLM"} <= set(config.auto_map)
    cut = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    for name in names:
        loaded = getattr(transformers, name).from_pretrained(tmp_path / "out", trust_remote_code=True)
        state = loaded.state_dict() if name == "AutoModel" else loaded.model.state_dict()
        assert set(state) == {tensor.removeprefix("model.") for tensor in cut}
        assert all(torch.equal(state[tensor.removeprefix("model.")], cut[tensor]) for tensor in cut)


def test_a_uniform_encoder_is_stock(tmp_path: Path) -> None:
    model, inputs = made("vit")
    result = pruned(model, inputs, layout="uniform")
    saved = save(model, tmp_path / "out", plan=result.plan)
    assert saved.layout == "uniform"
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


def test_settings_of_processors_are_kept(tmp_path: Path) -> None:
    dense, inputs = made("vit")
    dense.save_pretrained(tmp_path / "dense")
    file = "preprocessor_config.json"
    (tmp_path / "dense" / file).write_text('{"image_processor_type": "ViTImageProcessor"}')
    model: Any = transformers.ViTForImageClassification.from_pretrained(tmp_path / "dense").eval()
    save(model, tmp_path / "out", plan=pruned(model, inputs).plan)
    assert (tmp_path / "out" / file).read_text() == (tmp_path / "dense" / file).read_text()


@pytest.mark.parametrize("name", ["whisper", "reward"])
def test_a_fresh_process_puts_out_the_same(name: str, tmp_path: Path) -> None:
    model, inputs = made(name)
    save(model, tmp_path / "out", plan=pruned(model, inputs).plan)
    assert verify(tmp_path / "out", model) <= 1e-4


def test_what_a_dense_network_takes_in_has_to_be_said(tmp_path: Path) -> None:
    model, inputs = made("vit")
    with pytest.raises(UsageError, match="nothing says what it takes in. Pass inputs"):
        save(model, tmp_path / "out")
    assert save(model, tmp_path / "out", inputs=inputs).layout == "uniform"


def test_another_layout_than_asked_is_told(tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    plan = resect.prune(model, keep=0.7, layout="per-layer", settings={"criterion": "l2"}).plan
    assert plan.notes["layout"] == "per-layer"
    asked = plan.model_copy(update={"notes": {"layout": "uniform"}})
    with pytest.warns(OtherLayout, match=r"layout=uniform was asked for.*code beside it"):
        save(model, tmp_path / "out", plan=asked)


class Net(nn.Module):
    """Convolutions, a norm with statistics, and a head, of no library."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.second, self.head = nn.Conv2d(width, 24, 3, padding=1), nn.Linear(24, 5)
        self.tail = nn.Linear(5, 5)
        self.tail.bias = self.head.bias

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        hidden = torch.relu(self.norm(self.first(images)))
        return {"classes": self.tail(self.head(torch.relu(self.second(hidden)).mean((2, 3))))}


def cut_net(tmp_path: Path) -> tuple[Net, Tensor]:
    torch.manual_seed(1)
    images, net = torch.randn(2, 3, 8, 8), Net().eval()
    net.norm.running_mean = torch.randn(16)
    result = resect.prune(
        net, inputs=(images,), keep=0.6, of="model", layout="per-layer", settings={"criterion": "l2", "kinds": ["channels"]}
    )
    saved = save(net, tmp_path / "out", plan=result.plan)
    assert saved.layout == "weights"
    return net, images


def test_a_network_of_no_library_goes_into_a_fresh_one(tmp_path: Path) -> None:
    net, images = cut_net(tmp_path)
    fresh = load_into(Net().eval(), tmp_path / "out")
    assert fresh.first.out_channels == net.first.out_channels < 16
    assert torch.equal(fresh(images)["classes"], net(images)["classes"])
    assert fresh.tail.bias is fresh.head.bias
    assert resect.Plan.from_json((tmp_path / "out" / "plan.json").read_text()).removed()


def test_a_network_that_was_loaded_is_cut_further(tmp_path: Path) -> None:
    _, images = cut_net(tmp_path)
    fresh = load_into(Net().eval(), tmp_path / "out")
    settings = {"criterion": "l2", "kinds": ["channels"]}
    resect.prune(fresh, inputs=(images,), keep=0.7, of="model", layout="per-layer", settings=settings)
    save(fresh, tmp_path / "again")
    again = load_into(Net().eval(), tmp_path / "again")
    assert torch.equal(again(images)["classes"], fresh(images)["classes"])


def test_another_network_is_refused(tmp_path: Path) -> None:
    net, _ = cut_net(tmp_path)
    with pytest.raises(CheckpointError, match="does not fit Net"):
        load_into(Net(width=4), tmp_path / "out")
    with pytest.raises(UsageError, match="is cut already"):
        load_into(net, tmp_path / "out")
    with pytest.raises(CheckpointError):
        load_into(Net(), tmp_path)


def test_what_a_loaded_network_puts_out_is_compared(tmp_path: Path) -> None:
    class Other(Net):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return {"classes": 2 * super().forward(images)["classes"]}

    cut_net(tmp_path)
    with pytest.raises(CheckpointError, match="puts out something else"):
        load_into(Other(), tmp_path / "out")


class Held(nn.Module):
    """Heads whose number stands inside a mapping under a private name."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(31, 24), nn.Linear(24, 5)
        self.qkv, self.out = nn.Linear(24, 96), nn.Linear(32, 24)
        self._sizes, self._deep = {"heads": 4}, 4

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        q, k, v = (part.unflatten(-1, (self._sizes["heads"], -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*ids.shape, self._deep * 8)
        out: Tensor = self.head(x + self.out(mixed))
        return out


def halved() -> tuple[Any, Any]:
    """A network without half of its heads, and its example."""
    model, ids = Held().eval(), (torch.arange(14).view(2, 7),)
    graph = resect.trace(model, ids)
    kept = {"kind": "heads", "layer": None, "units": 4, "keep": [1, 3]}
    plan = resect.Plan.model_validate({"groups": {group.name: kept for group in graph.of_kind("heads")}})
    return resect.cut(model, plan, graph), ids


def test_numbers_inside_holders_and_under_private_names_are_saved(tmp_path: Path) -> None:
    model, ids = halved()
    assert (model._sizes, model._deep) == ({"heads": 2}, 2)
    save(model, tmp_path / "out", inputs=ids)
    loaded = load_into(Held().eval(), tmp_path / "out")
    torch.testing.assert_close(loaded(*ids), model(*ids))


@pytest.mark.parametrize("name", ["_modules", "_buffers/head", "training", "__class__", "_a/__b__", "x/../y"])
def test_what_torch_keeps_is_no_number_of_a_record(name: str, tmp_path: Path) -> None:
    model, ids = halved()
    save(model, tmp_path / "out", inputs=ids)
    noted = json.loads((tmp_path / "out" / "resect.json").read_text())
    noted["record"]["attributes"][""][name] = 3
    (tmp_path / "out" / "resect.json").write_text(json.dumps(noted))
    with pytest.raises(CheckpointError, match=r"damaged|does not fit"):
        load_into(Held().eval(), tmp_path / "out")


class Ranked(nn.Module):
    """Numbers of categories in a column of numbers, and lengths: values matter, and random ones do not do."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.enter, self.leave = nn.Embedding(11, 8), nn.Linear(10, 16), nn.Linear(16, 3)

    def forward(self, rows: Tensor, lengths: Tensor) -> Tensor:
        inside = torch.arange(int(lengths.max())) < lengths[:, None]
        known = torch.cat([self.table(rows[..., 0].long()), rows[..., 1:]], -1)[:, : inside.shape[1]]
        out: Tensor = self.leave(self.enter(known).relu() * inside[..., None])
        return out

    def load_state_dict(self, *args: Any, **named: Any) -> Any:
        """Tells nothing, as some networks' own."""
        super().load_state_dict(*args, **named)


def test_values_that_matter_are_those_of_the_example(tmp_path: Path) -> None:
    model = Ranked().eval()
    rows = torch.cat([torch.arange(14).view(2, 7, 1) % 11, torch.randn(2, 7, 2)], -1)
    inputs = (rows, torch.tensor([6, 3]))
    result = resect.prune(model, keep=0.6, of="model", inputs=inputs, settings={"criterion": "l2", "kinds": ["channels"]})
    assert result.plan.removed()
    save(model, tmp_path / "out", plan=result.plan, inputs=inputs)
    check = json.loads((tmp_path / "out" / "resect.json").read_text())["check"]
    assert not check["drawn"]
    loaded = load_into(Ranked().eval(), tmp_path / "out")
    torch.testing.assert_close(loaded(*inputs), model(*inputs))
    other = Ranked().eval()
    other.register_forward_hook(lambda module, inputs, output: output + 1)
    with pytest.raises(CheckpointError, match="puts out something else"):
        load_into(other, tmp_path / "out")
