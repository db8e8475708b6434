"""Networks of transformers that are not decoders alone: encoders, encoder-decoders, speech, images, images with text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import resect
from tests.graph.verify import assert_cut_equals_mask, difference, outputs, plans
from tests.zoo.examine import lively
from tests.zoo.shrink import DEPTHS, overlaid, small

IMAGE_TOKEN, LAYERS = 99, 2
Fields = Mapping[str, Any]


def numbers(length: int = 7) -> Tensor:
    """Ordinary tokens [2, length]."""
    return torch.randint(3, 90, (2, length))


def shallow(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration with two layers in every stack."""
    for name, value in values.items():
        if isinstance(value, dict):
            shallow(value)
        elif type(value) is int and re.fullmatch(DEPTHS, name):
            values[name] = LAYERS
        elif name == "layer_types" and value:
            values[name] = value[:LAYERS]
    return values


def build(name: str, config: str, fields: Fields) -> torch.nn.Module:
    """A small transformers model with noise on all it has learned."""
    config_class = getattr(transformers, config)
    values = overlaid(shallow(small(config_class().to_dict())), fields)
    return lively(getattr(transformers, name)._from_config(config_class.from_dict(values)), seed=0)


@dataclass(frozen=True)
class Network:
    """A model class, what its small configuration needs besides, and how many groups of how many units it must offer."""

    model: str
    config: str
    groups: Mapping[int, int]
    inputs: Callable[[], Fields]
    fields: Fields = field(default_factory=dict)
    part: str = ""


def text() -> Fields:
    """For an encoder."""
    return {"input_ids": numbers()}


def causal() -> Fields:
    """For a decoder."""
    return {"input_ids": numbers(), "use_cache": False}


def pair() -> Fields:
    """For an encoder and a decoder."""
    return {"input_ids": numbers(), "decoder_input_ids": numbers(5), "use_cache": False}


def spectrum(*shape: int) -> Callable[[], Fields]:
    """Sound for an encoder, text for a decoder."""
    return lambda: {"input_features": torch.randn(2, *shape), "decoder_input_ids": numbers(5), "use_cache": False}


def wave() -> Fields:
    """Sound as it is."""
    return {"input_values": torch.randn(2, 60)}


def image() -> Fields:
    """Two images."""
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def illustrated(patches: int, *, images: tuple[int, ...] = (), **more: Any) -> Callable[[], Fields]:
    """Text with an image of so many patches between its words."""

    def inputs() -> Fields:
        words = numbers()
        places = torch.full((2, patches), IMAGE_TOKEN)
        given = {"input_ids": torch.cat([words[:, :2], places, words[:, 2:]], 1), "use_cache": False}
        return {**given, "pixel_values": torch.randn(2, *images, 3, 32, 32), **more}

    return inputs


EYES = {"image_size": 32, "patch_size": 8}
SEES = {"image_token_id": IMAGE_TOKEN, "image_token_index": IMAGE_TOKEN}
LLAVA = {"vision_config": EYES, **SEES}
SMOL = {"vision_config": EYES, "scale_factor": 2, "image_token_id": IMAGE_TOKEN}
ROTATED = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
QWEN = {"image_token_id": IMAGE_TOKEN, "video_token_id": 98, "vision_start_token_id": 97, "text_config": ROTATED}
PALIGEMMA = {**SEES, "projection_dim": 128, "vision_config": {**EYES, "projection_dim": 128}}
EARS = {
    **{"conv_dim": [16, 24], "conv_kernel": [4, 3], "conv_stride": [2, 2], "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 4},
}
WHISPER = {"max_source_positions": 13, "num_mel_bins": 10}
SPEECH = {"conv_channels": 24, "input_feat_per_channel": 10, "num_conv_layers": 2, "conv_kernel_sizes": [5, 5]}
NO_STAGES = {"stage_names": None, "out_features": None, "out_indices": None}
SWIN = {**EYES, "patch_size": 2, "window_size": 4, "depths": [2, 2], "num_heads": [3, 6], "embed_dim": 24, **NO_STAGES}
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
DEBERTA_V2 = {**DISENTANGLED, "position_buckets": 8, "share_att_key": True, "norm_rel_ebd": "layer_norm"}
DINO = {"hidden_size": 48, "num_attention_heads": 6, "mlp_ratio": 2, **NO_STAGES}

ENCODER = {8: 2, 72: 2, 128: 1}  # heads and channels of two blocks, the residual stream
BOTH = {8: 6, 72: 4}  # self-attention of two encoder and two decoder blocks, cross-attention, channels of all four
SEEN = {8: 2, 4: 2, 72: 4}  # heads of the image's blocks and of the text's, channels of both

NETWORKS = {
    # relative positions are one table for all self-attention of a stack, so heads go in all its blocks alike
    "t5": Network("T5ForConditionalGeneration", "T5Config", {8: 3, 72: 4}, pair),
    "t5 gated": Network("T5ForConditionalGeneration", "T5Config", {8: 3, 72: 4}, pair, {"feed_forward_proj": "gated-gelu"}),
    "bart": Network("BartForConditionalGeneration", "BartConfig", BOTH, pair),
    "mbart": Network("MBartForConditionalGeneration", "MBartConfig", BOTH, pair),
    "marian": Network("MarianMTModel", "MarianConfig", BOTH, pair),
    "pegasus": Network("PegasusForConditionalGeneration", "PegasusConfig", BOTH, pair),
    "whisper": Network("WhisperForConditionalGeneration", "WhisperConfig", {**BOTH, 128: 1}, spectrum(10, 26), WHISPER),
    "speech to text": Network(
        "Speech2TextForConditionalGeneration", "Speech2TextConfig", {**BOTH, 12: 1}, spectrum(26, 10), SPEECH
    ),
    "bert": Network("BertForMaskedLM", "BertConfig", ENCODER, text),
    "bert, classes": Network("BertForSequenceClassification", "BertConfig", {**ENCODER, 128: 2}, text),
    "roberta": Network("RobertaForSequenceClassification", "RobertaConfig", {**ENCODER, 128: 2}, text),
    "distilbert": Network("DistilBertForMaskedLM", "DistilBertConfig", {8: 2, 128: 3}, text),
    "deberta": Network("DebertaForSequenceClassification", "DebertaConfig", ENCODER, text, DISENTANGLED),
    "deberta 2": Network("DebertaV2ForMaskedLM", "DebertaV2Config", ENCODER, text, DEBERTA_V2),
    "electra": Network("ElectraForMaskedLM", "ElectraConfig", ENCODER, text),
    "albert": Network("AlbertForMaskedLM", "AlbertConfig", {8: 1, 72: 1, 128: 2}, text),  # one block, run twice
    "modernbert": Network("ModernBertForMaskedLM", "ModernBertConfig", ENCODER, text),
    "wav2vec2": Network("Wav2Vec2ForCTC", "Wav2Vec2Config", {8: 2, 72: 2, 16: 1, 24: 1}, wave, EARS),
    "hubert": Network("HubertForCTC", "HubertConfig", {8: 2, 72: 2, 16: 1, 24: 1}, wave, EARS),
    "vit": Network("ViTForImageClassification", "ViTConfig", ENCODER, image, EYES),
    "dinov2": Network("Dinov2ForImageClassification", "Dinov2Config", {6: 2, 96: 2, 48: 1}, image, {**EYES, **DINO}),
    "swin": Network("SwinForImageClassification", "SwinConfig", {3: 2, 6: 2, 96: 2, 192: 2}, image, SWIN),
    "clip": Network("CLIPModel", "CLIPConfig", {8: 4, 72: 4}, lambda: {**text(), **image()}, {"vision_config": EYES}),
    "llava, text": Network("LlavaForConditionalGeneration", "LlavaConfig", {4: 2, 72: 2, 128: 1}, causal, LLAVA),
    "llava": Network("LlavaForConditionalGeneration", "LlavaConfig", SEEN, illustrated(16), LLAVA),
    "llava, part": Network("LlavaForConditionalGeneration", "LlavaConfig", {4: 2, 72: 2}, causal, LLAVA, "model.language_model"),
    "paligemma": Network("PaliGemmaForConditionalGeneration", "PaliGemmaConfig", {8: 4, 72: 4}, illustrated(16), PALIGEMMA),
    "smolvlm": Network("SmolVLMForConditionalGeneration", "SmolVLMConfig", SEEN, illustrated(4, images=(1,)), SMOL),
    "qwen2 vl, text": Network("Qwen2VLForConditionalGeneration", "Qwen2VLConfig", {4: 2, 72: 2}, causal, QWEN),
    "qwen2.5 vl, part": Network(
        "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", {4: 2, 72: 2}, causal, QWEN, "model.language_model"
    ),
}


def built(name: str) -> tuple[torch.nn.Module, Fields]:
    """The network and its example."""
    network = NETWORKS[name]
    model = build(network.model, network.config, network.fields).get_submodule(network.part)
    return model, network.inputs()


@pytest.mark.parametrize("name", NETWORKS)
def test_cut_equals_mask(name: str) -> None:
    model, inputs = built(name)
    before = outputs(model, inputs)
    graph = resect.trace(model, inputs)
    assert difference(before, outputs(model, inputs)) == 0
    offered = Counter(group.units for group in graph.groups)
    assert all(offered[units] >= count for units, count in NETWORKS[name].groups.items()), offered
    for plan in plans(graph).values():
        assert_cut_equals_mask(model, graph, inputs, plan)


def test_what_only_images_need_is_kept_where_none_is_given() -> None:
    model, inputs = built("llava, text")
    graph = resect.trace(model, inputs)
    members = {member.parameter for group in graph.groups for member in group.members}
    assert not any("vision_tower" in name for name in members)
    unused = {frozen.parameter for frozen in graph.frozen if frozen.reason == "not used in the traced run"}
    assert {name for name, _ in model.named_parameters() if "vision_tower" in name} <= unused


def test_rows_of_a_table_that_the_text_did_not_reach_are_kept() -> None:
    """DeBERTa slices the middle of its table of relative positions: what lies around is for longer texts."""
    model, inputs = built("deberta")
    graph = resect.trace(model, inputs)
    table = "deberta.encoder.rel_embeddings.weight"
    assert {member.axis for group in graph.groups for member in group.members if member.parameter == table} == {1}


def test_hidden_states_are_what_they_were_after_a_trace() -> None:
    """The first run of a transformers model hangs up hooks that note hidden states; a trace takes them down again."""
    model, inputs = built("bert")
    graph = resect.trace(model, inputs)
    assert graph.groups
    with torch.no_grad():
        assert len(model(**inputs, output_hidden_states=True).hidden_states) == LAYERS + 1


def test_blocks_stay_where_the_state_between_two_is_read_outside() -> None:
    """LLaVA reads what enters the last block of its image tower: with a block fewer, another state would be the one before."""
    model, inputs = built("llava")
    graph = resect.trace(model, inputs)
    assert not [group for group in graph.of_kind("blocks") if "vision_tower" in group.name]
