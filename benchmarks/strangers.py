"""Networks of libraries that resect was not made for: how each is built, an example of its inputs, and another size of them.

Random weights, small sizes, no two of them alike where the library allows it. `NETWORKS` has them all, `library/network`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[Any, ...] | dict[str, Any]
"""Positional or named arguments of one call."""


@dataclass(frozen=True)
class Stranger:
    """A network with inputs."""

    model: nn.Module
    inputs: Inputs
    other: Inputs = field(default=())
    """Inputs of another size: batch, and length or resolution where the network takes others."""
    single: bool = False
    """Whether it computes in float32 whatever its weights are."""


NETWORKS: dict[str, Callable[[], Stranger]] = {}


def stranger(name: str) -> Callable[[Callable[[], Stranger]], Callable[[], Stranger]]:
    """Puts a builder into the table."""

    def put(builder: Callable[[], Stranger]) -> Callable[[], Stranger]:
        assert name not in NETWORKS, name
        NETWORKS[name] = builder
        return builder

    return put


def tokens(batch: int, length: int, symbols: int = 64) -> Tensor:
    """Numbers of tokens, [batch, length]."""
    return torch.randint(1, symbols, (batch, length), generator=torch.Generator().manual_seed(0))


def images(batch: int, side: int | tuple[int, ...], channels: int = 3, dimensions: int = 2) -> Tensor:
    """[batch, channels, side, ...]."""
    sides = (side,) * dimensions if isinstance(side, int) else side
    return torch.randn(batch, channels, *sides, generator=torch.Generator().manual_seed(0))


def series(batch: int, length: int, width: int) -> Tensor:
    """[batch, length, width]."""
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(0))


# Language models ------------------------------------------------------------------------------------------------------


def _litgpt(**settings: Any) -> Stranger:
    from litgpt import GPT, Config

    sizes = {"block_size": 32, "n_layer": 3, "n_head": 4, "n_embd": 48, "vocab_size": 64, "padded_vocab_size": 64}
    return Stranger(GPT(Config(**{**sizes, **settings})), (tokens(2, 7),), (tokens(3, 11),))


@stranger("litgpt/llama")
def _() -> Stranger:
    names = {"norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "bias": False, "rotary_percentage": 1.0}
    return _litgpt(n_query_groups=2, intermediate_size=80, parallel_residual=False, **names)


@stranger("litgpt/gpt-neox")
def _() -> Stranger:
    return _litgpt(rotary_percentage=0.5)


@stranger("litgpt/gemma")
def _() -> Stranger:
    names = {"norm_class_name": "RMSNorm", "mlp_class_name": "GemmaMLP", "bias": False, "rotary_percentage": 1.0}
    return _litgpt(n_query_groups=1, head_size=20, intermediate_size=80, scale_embeddings=True, parallel_residual=False, **names)


@stranger("litgpt/mixtral")
def _() -> Stranger:
    names = {"norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMoE", "bias": False, "rotary_percentage": 1.0}
    experts = {"n_expert": 5, "n_expert_per_token": 2, "moe_intermediate_size": 44}
    return _litgpt(n_query_groups=2, intermediate_size=44, parallel_residual=False, **names, **experts)


def _x_decoder(**settings: Any) -> Stranger:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=48, depth=3, heads=4, attn_dim_head=12, **settings)
    return Stranger(TransformerWrapper(num_tokens=64, max_seq_len=32, attn_layers=layers), (tokens(2, 7),), (tokens(3, 11),))


@stranger("x-transformers/decoder")
def _() -> Stranger:
    return _x_decoder()


@stranger("x-transformers/decoder-rotary-swiglu")
def _() -> Stranger:
    return _x_decoder(rotary_pos_emb=True, ff_glu=True, ff_swish=True, use_rmsnorm=True, ff_no_bias=True)


@stranger("x-transformers/decoder-grouped-queries")
def _() -> Stranger:
    return _x_decoder(attn_kv_heads=2, attn_qk_norm=True)


@stranger("x-transformers/decoder-alibi-sandwich")
def _() -> Stranger:
    return _x_decoder(alibi_pos_bias=True, alibi_num_heads=2, sandwich_norm=True)


@stranger("x-transformers/decoder-gated-memory")
def _() -> Stranger:
    return _x_decoder(attn_gate_values=True, attn_num_mem_kv=3, gate_residual=True)


@stranger("x-transformers/encoder")
def _() -> Stranger:
    from x_transformers import Encoder, TransformerWrapper

    layers = Encoder(dim=48, depth=3, heads=4, attn_dim_head=12, rel_pos_bias=True)
    return Stranger(TransformerWrapper(num_tokens=64, max_seq_len=32, attn_layers=layers), (tokens(2, 7),), (tokens(3, 11),))


@stranger("x-transformers/encoder-decoder")
def _() -> Stranger:
    from x_transformers import XTransformer

    def side(symbols: int, depth: int) -> dict[str, Any]:
        return {"num_tokens": symbols, "depth": depth, "heads": 4, "max_seq_len": 32, "attn_dim_head": 12}

    parts = {
        f"{where}_{name}": value for where, given in (("enc", side(56, 2)), ("dec", side(64, 3))) for name, value in given.items()
    }
    model = XTransformer(dim=48, **parts)
    return Stranger(model, (tokens(2, 9, 56), tokens(2, 7)), (tokens(3, 13, 56), tokens(3, 11)))


@stranger("x-transformers/vit")
def _() -> Stranger:
    from x_transformers import Encoder, ViTransformerWrapper

    layers = Encoder(dim=48, depth=3, heads=4, attn_dim_head=12)
    model = ViTransformerWrapper(image_size=32, patch_size=8, num_classes=10, attn_layers=layers)
    return Stranger(model, (images(2, 32),), (images(3, 32),))


@stranger("mambapy/mamba-lm")
def _() -> Stranger:
    from mambapy.mamba import Mamba, MambaConfig

    layers = Mamba(MambaConfig(d_model=48, n_layers=3, d_state=6))
    model = nn.Sequential(nn.Embedding(64, 48), layers, nn.RMSNorm(48), nn.Linear(48, 64, bias=False))
    return Stranger(model, (tokens(2, 8),), (tokens(3, 16),))


@stranger("performer-pytorch/lm")
def _() -> Stranger:
    from performer_pytorch import PerformerLM

    model = PerformerLM(num_tokens=64, max_seq_len=32, dim=48, depth=2, heads=4, dim_head=12, causal=False)
    return Stranger(model, (tokens(2, 7),), (tokens(3, 11),))


@stranger("linear-attention-transformer/lm")
def _() -> Stranger:
    from linear_attention_transformer import LinearAttentionTransformerLM

    model = LinearAttentionTransformerLM(num_tokens=64, dim=48, heads=4, depth=2, max_seq_len=32, causal=False)
    return Stranger(model, (tokens(2, 32),), (tokens(3, 32),))


@stranger("linformer/lm")
def _() -> Stranger:
    from linformer import LinformerLM

    model = LinformerLM(num_tokens=64, dim=48, seq_len=32, depth=2, heads=4, dim_head=12, k=10)
    return Stranger(model, (tokens(2, 32),), (tokens(3, 32),))


@stranger("nystrom-attention/nystromformer")
def _() -> Stranger:
    from nystrom_attention import Nystromformer

    model = Nystromformer(dim=48, dim_head=12, heads=4, depth=2, num_landmarks=4)
    return Stranger(model, (series(2, 16, 48),), (series(3, 24, 48),))


@stranger("reformer-pytorch/reformer-lm")
def _() -> Stranger:
    from reformer_pytorch import ReformerLM

    model = ReformerLM(num_tokens=64, dim=48, depth=2, max_seq_len=64, heads=4, bucket_size=8, n_hashes=2, causal=True)
    return Stranger(model, (tokens(2, 32),), (tokens(3, 64),))


@stranger("g-mlp-pytorch/lm")
def _() -> Stranger:
    from g_mlp_pytorch import gMLP

    return Stranger(gMLP(num_tokens=64, dim=48, depth=2, seq_len=16, causal=True), (tokens(2, 16),), (tokens(3, 16),))


@stranger("local-attention/local-transformer")
def _() -> Stranger:
    from local_attention import LocalTransformer

    sizes = {"num_tokens": 64, "dim": 48, "depth": 2, "max_seq_len": 64, "local_attn_window_size": 8, "heads": 4, "dim_head": 12}
    return Stranger(LocalTransformer(causal=True, **sizes), (tokens(2, 16),), (tokens(3, 24),))


@stranger("fair-esm/esm2")
def _() -> Stranger:
    from esm.data import Alphabet
    from esm.model.esm2 import ESM2

    model = ESM2(num_layers=3, embed_dim=48, attention_heads=4, alphabet=Alphabet.from_architecture("ESM-1b"))
    return Stranger(model, (tokens(2, 7, 24) + 3,), (tokens(3, 11, 24) + 3,))


@stranger("enformer-pytorch/enformer")
def _() -> Stranger:
    from enformer_pytorch import Enformer

    sizes = {"dim": 96, "depth": 2, "heads": 4, "target_length": 2, "num_downsamples": 5, "dim_divisible_by": 8}
    model = Enformer.from_hparams(output_heads={"human": 7}, attn_dim_key=8, use_checkpointing=False, **sizes)
    return Stranger(model, (tokens(2, 128, 5) - 1,), (tokens(3, 128, 5) - 1,), single=True)


# torch itself ---------------------------------------------------------------------------------------------------------


@stranger("torch/TransformerEncoder")
def _() -> Stranger:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(48, 4, 80, batch_first=True), 3)
    model = nn.Sequential(nn.Embedding(64, 48), encoder, nn.Linear(48, 9))
    return Stranger(model, (tokens(2, 7),), (tokens(3, 11),))


@stranger("torch/Transformer")
def _() -> Stranger:
    model = nn.Transformer(48, 4, 2, 3, 80, batch_first=True)
    return Stranger(model, (series(2, 9, 48), series(2, 7, 48)), (series(3, 13, 48), series(3, 11, 48)))


@stranger("torch/LSTM-tagger")
def _() -> Stranger:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(64, 20)
            self.lstm = nn.LSTM(20, 24, num_layers=2, batch_first=True, bidirectional=True)
            self.project = nn.Sequential(nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 9))

        def forward(self, words: Tensor) -> Tensor:
            return self.project(self.lstm(self.embedding(words))[0])

    return Stranger(Tagger(), (tokens(2, 7),), (tokens(3, 11),))


# Images ---------------------------------------------------------------------------------------------------------------


def _vit(module: str, name: str, **settings: Any) -> Stranger:
    import importlib

    side = settings.pop("image_size", 32) if name == "SepViT" else settings.get("image_size", 32)
    model = getattr(importlib.import_module(f"vit_pytorch.{module}"), name)(num_classes=10, **settings)
    return Stranger(model, (images(2, side),), (images(3, side),), single=name == "CrossFormer")


VIT = {"image_size": 32, "patch_size": 8, "dim": 48, "depth": 3, "heads": 4, "mlp_dim": 80}
VITS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("vit", "ViT", {**VIT, "dim_head": 12}),
    "simple-vit": ("simple_vit", "SimpleViT", {**VIT, "dim_head": 12}),
    "simple-vit-qk-norm": ("simple_vit_with_qk_norm", "SimpleViT", {**VIT, "dim_head": 12}),
    "simple-vit-registers": ("simple_vit_with_register_tokens", "SimpleViT", {**VIT, "dim_head": 12}),
    "simple-vit-value-residual": ("simple_vit_with_value_residual", "SimpleViT", {**VIT, "dim_head": 12}),
    "normalized-vit": ("normalized_vit", "nViT", {**VIT, "dim_head": 12}),
    "deepvit": ("deepvit", "DeepViT", {**VIT, "dim_head": 12}),
    "cait": ("cait", "CaiT", {**VIT, "dim_head": 12, "cls_depth": 2}),
    "parallel-vit": ("parallel_vit", "ViT", {**VIT, "dim_head": 12, "num_parallel_branches": 2}),
    "learnable-memory-vit": ("learnable_memory_vit", "ViT", {**VIT, "dim_head": 12}),
    "vit-patch-merger": (
        "vit_with_patch_merger",
        "ViT",
        {**VIT, "dim_head": 12, "patch_merge_layer": 1, "patch_merge_num_tokens": 4},
    ),
    "vit-small-dataset": ("vit_for_small_dataset", "ViT", {**VIT, "dim_head": 12}),
    "t2t": (
        "t2t",
        "T2TViT",
        {"image_size": 32, "dim": 48, "depth": 2, "heads": 4, "mlp_dim": 80, "dim_head": 12, "t2t_layers": ((3, 2), (3, 2))},
    ),
    "cross-vit": (
        "cross_vit",
        "CrossViT",
        {
            "image_size": 32,
            "depth": 2,
            "sm_dim": 40,
            "lg_dim": 56,
            "sm_patch_size": 8,
            "lg_patch_size": 16,
            "sm_enc_depth": 1,
            "lg_enc_depth": 1,
            "sm_enc_heads": 3,
            "lg_enc_heads": 3,
            "sm_enc_mlp_dim": 60,
            "lg_enc_mlp_dim": 70,
            "sm_enc_dim_head": 12,
            "lg_enc_dim_head": 12,
            "cross_attn_dim_head": 12,
            "cross_attn_heads": 3,
        },
    ),
    "crossformer": (
        "crossformer",
        "CrossFormer",
        {"dim": (64, 72, 80, 96), "depth": (1, 1, 1, 1), "global_window_size": (2, 2, 2, 1), "local_window_size": (2, 2, 2, 1)},
    ),
    "cct": (
        "cct",
        "CCT",
        {
            "img_size": 32,
            "embedding_dim": 48,
            "n_conv_layers": 2,
            "kernel_size": 3,
            "stride": 2,
            "padding": 1,
            "num_layers": 2,
            "num_heads": 4,
            "mlp_ratio": 2.0,
        },
    ),
    "levit": (
        "levit",
        "LeViT",
        {"image_size": 64, "dim": (32, 40, 48), "depth": 1, "heads": (2, 3, 4), "mlp_mult": 2, "dim_key": 8, "dim_value": 12},
    ),
    "mobile-vit": (
        "mobile_vit",
        "MobileViT",
        {"image_size": (64, 64), "dims": [36, 40, 44], "channels": [8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 40]},
    ),
    "max-vit": ("max_vit", "MaxViT", {"dim": 24, "depth": (1, 1), "dim_head": 8, "window_size": 2, "dim_conv_stem": 12}),
    "cvt": ("cvt", "CvT", {}),
    "pit": (
        "pit",
        "PiT",
        {"image_size": 32, "patch_size": 4, "dim": 48, "depth": (2, 2), "heads": 4, "mlp_dim": 80, "dim_head": 12},
    ),
    "nest": (
        "nest",
        "NesT",
        {"image_size": 32, "patch_size": 4, "dim": 24, "heads": 3, "num_hierarchies": 2, "block_repeats": (1, 1)},
    ),
    "xcit": ("xcit", "XCiT", {**VIT, "dim_head": 12, "cls_depth": 2}),
    "twins": (
        "twins_svt",
        "TwinsSVT",
        {
            "s1_emb_dim": 16,
            "s2_emb_dim": 24,
            "s3_emb_dim": 32,
            "s4_emb_dim": 40,
            "s1_patch_size": 2,
            "s1_local_patch_size": 2,
            "s2_local_patch_size": 2,
            "s3_local_patch_size": 2,
            "s1_depth": 1,
            "s2_depth": 1,
            "s3_depth": 1,
            "s4_depth": 1,
            "s1_global_k": 2,
            "s2_global_k": 2,
            "s3_global_k": 2,
            "s4_global_k": 1,
        },
    ),
    "regionvit": ("regionvit", "RegionViT", {"dim": (16, 24, 32, 40), "depth": (1, 1, 1, 1), "window_size": 2}),
    "scalable-vit": (
        "scalable_vit",
        "ScalableViT",
        {
            "dim": 16,
            "heads": (2, 2, 2, 4),
            "depth": (1, 1, 1, 1),
            "ssa_dim_key": 8,
            "reduction_factor": (2, 2, 1, 1),
            "window_size": (2, 2, None, None),
        },
    ),
    "sep-vit": ("sep_vit", "SepViT", {"dim": 16, "dim_head": 8, "heads": (1, 2, 4), "depth": (1, 1, 1), "image_size": 112}),
}
for _name, (_module, _class, _settings) in VITS.items():
    NETWORKS[f"vit-pytorch/{_name}"] = lambda m=_module, c=_class, s=_settings: _vit(m, c, **s)


@stranger("vit-pytorch/vit-3d")
def _() -> Stranger:
    from vit_pytorch.vit_3d import ViT

    model = ViT(
        image_size=16, image_patch_size=8, frames=8, frame_patch_size=4, num_classes=10, dim=48, depth=2, heads=4, mlp_dim=80
    )
    return Stranger(model, (torch.randn(2, 3, 8, 16, 16),), (torch.randn(3, 3, 8, 16, 16),))


@stranger("mlp-mixer-pytorch/mixer")
def _() -> Stranger:
    from mlp_mixer_pytorch import MLPMixer

    model = MLPMixer(image_size=32, channels=3, patch_size=8, dim=48, depth=3, num_classes=10)
    return Stranger(model, (images(2, 32),), (images(3, 32),))


@stranger("efficientnet-pytorch/b0")
def _() -> Stranger:
    from efficientnet_pytorch import EfficientNet

    return Stranger(EfficientNet.from_name("efficientnet-b0", num_classes=10), (images(2, 64),), (images(3, 96),))


@stranger("facenet-pytorch/inception-resnet")
def _() -> Stranger:
    from facenet_pytorch.models.inception_resnet_v1 import InceptionResnetV1

    return Stranger(InceptionResnetV1(pretrained=None, classify=True, num_classes=10), (images(2, 96),), (images(3, 128),))


def _segmentation(name: str, **settings: Any) -> Stranger:
    import segmentation_models_pytorch as library

    model = getattr(library, name)("resnet18", encoder_weights=None, classes=5, **settings)
    return Stranger(model, (images(2, 128),), (images(3, 160),))


for _name in ("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3Plus", "PAN", "UPerNet", "Segformer"):
    NETWORKS[f"segmentation-models-pytorch/{_name}"] = lambda name=_name: _segmentation(name)


@stranger("open-clip/clip")
def _() -> Stranger:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    image = CLIPVisionCfg(layers=2, width=48, head_width=12, patch_size=8, image_size=32)
    text = CLIPTextCfg(context_length=12, vocab_size=64, width=40, heads=4, layers=2)
    return Stranger(CLIP(36, image, text), (images(2, 32), tokens(2, 12)), (images(3, 32), tokens(3, 12)))


def _diffusers(name: str, inputs: Inputs, other: Inputs, **settings: Any) -> Stranger:
    import diffusers

    return Stranger(getattr(diffusers, name)(**settings), inputs, other)


@stranger("diffusers/UNet2DModel")
def _() -> Stranger:
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {
        "sample_size": 16,
        "block_out_channels": (24, 40),
        "norm_num_groups": 4,
        "attention_head_dim": 8,
        "layers_per_block": 1,
    }
    step = torch.tensor(5)
    return _diffusers("UNet2DModel", (images(2, 16), step), (images(3, 24), step), **blocks, **sizes)


@stranger("diffusers/UNet2DConditionModel")
def _() -> Stranger:
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    sizes = {
        "sample_size": 16,
        "block_out_channels": (24, 48),
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "layers_per_block": 1,
    }
    step = torch.tensor(5)
    first, second = (images(2, 16, 4), step, series(2, 7, 36)), (images(3, 24, 4), step, series(3, 9, 36))
    return _diffusers("UNet2DConditionModel", first, second, cross_attention_dim=36, **blocks, **sizes)


@stranger("diffusers/AutoencoderKL")
def _() -> Stranger:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (16, 24), "norm_num_groups": 4, "latent_channels": 4, "sample_size": 16}
    return _diffusers("AutoencoderKL", (images(2, 16),), (images(3, 24),), **blocks, **sizes)


@stranger("diffusers/DiTTransformer2DModel")
def _() -> Stranger:
    sizes = {"num_attention_heads": 4, "attention_head_dim": 12, "num_layers": 2, "sample_size": 8, "norm_num_groups": 4}
    first = {"hidden_states": images(2, 8, 4), "timestep": torch.tensor([5, 6]), "class_labels": torch.tensor([1, 2])}
    second = {"hidden_states": images(3, 8, 4), "timestep": torch.tensor([5, 6, 7]), "class_labels": torch.tensor([1, 2, 3])}
    return _diffusers("DiTTransformer2DModel", first, second, num_embeds_ada_norm=10, **sizes)


@stranger("diffusers/PixArtTransformer2DModel")
def _() -> Stranger:
    sizes = {"num_attention_heads": 4, "attention_head_dim": 12, "num_layers": 2, "sample_size": 8, "cross_attention_dim": 48}

    def inputs(batch: int, length: int) -> dict[str, Any]:
        return {
            "hidden_states": images(batch, 8, 4),
            "encoder_hidden_states": series(batch, length, 36),
            "timestep": torch.arange(batch),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }

    return _diffusers(
        "PixArtTransformer2DModel", inputs(2, 7), inputs(3, 9), caption_channels=36, use_additional_conditions=False, **sizes
    )


@stranger("diffusers/SD3Transformer2DModel")
def _() -> Stranger:
    sizes = {
        "sample_size": 8,
        "num_layers": 2,
        "attention_head_dim": 12,
        "num_attention_heads": 4,
        "joint_attention_dim": 36,
        "caption_projection_dim": 48,
        "pooled_projection_dim": 28,
        "pos_embed_max_size": 8,
        "in_channels": 4,
        "out_channels": 4,
    }

    def inputs(batch: int, length: int) -> dict[str, Any]:
        return {
            "hidden_states": images(batch, 8, 4),
            "encoder_hidden_states": series(batch, length, 36),
            "pooled_projections": torch.randn(batch, 28),
            "timestep": torch.arange(batch),
        }

    return _diffusers("SD3Transformer2DModel", inputs(2, 7), inputs(3, 9), **sizes)


@stranger("diffusers/FluxTransformer2DModel")
def _() -> Stranger:
    sizes = {
        "in_channels": 8,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 12,
        "num_attention_heads": 4,
        "joint_attention_dim": 36,
        "pooled_projection_dim": 28,
        "axes_dims_rope": (4, 4, 4),
        "guidance_embeds": False,
    }

    def inputs(batch: int, length: int) -> dict[str, Any]:
        return {
            "hidden_states": series(batch, 16, 8),
            "encoder_hidden_states": series(batch, length, 36),
            "pooled_projections": torch.randn(batch, 28),
            "timestep": torch.arange(batch).float(),
            "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(length, 3),
        }

    return _diffusers("FluxTransformer2DModel", inputs(2, 7), inputs(3, 9), **sizes)


MONAI: dict[str, tuple[dict[str, Any], int, int, int, int]] = {
    "UNet": (
        {"spatial_dims": 2, "in_channels": 1, "out_channels": 3, "channels": (8, 12, 20), "strides": (2, 2), "num_res_units": 2},
        1,
        32,
        48,
        2,
    ),
    "BasicUNet": ({"spatial_dims": 2, "in_channels": 1, "out_channels": 3, "features": (8, 12, 16, 20, 24, 8)}, 1, 32, 48, 2),
    "AttentionUnet": (
        {"spatial_dims": 2, "in_channels": 1, "out_channels": 3, "channels": (8, 12, 20), "strides": (2, 2)},
        1,
        32,
        48,
        2,
    ),
    "DynUNet": (
        {
            "spatial_dims": 2,
            "in_channels": 1,
            "out_channels": 3,
            "kernel_size": (3, 3, 3),
            "strides": (1, 2, 2),
            "upsample_kernel_size": (2, 2),
            "filters": (8, 12, 20),
        },
        1,
        32,
        48,
        2,
    ),
    "SegResNet": ({"spatial_dims": 3, "init_filters": 8, "in_channels": 1, "out_channels": 3}, 1, 16, 24, 3),
    "UNETR": (
        {
            "in_channels": 1,
            "out_channels": 3,
            "img_size": 32,
            "feature_size": 8,
            "hidden_size": 48,
            "mlp_dim": 80,
            "num_heads": 4,
            "spatial_dims": 2,
        },
        1,
        32,
        32,
        2,
    ),
    "SwinUNETR": (
        {
            "in_channels": 1,
            "out_channels": 3,
            "feature_size": 12,
            "depths": (1, 1, 1, 1),
            "num_heads": (2, 3, 4, 6),
            "spatial_dims": 2,
            "window_size": 4,
        },
        1,
        64,
        64,
        2,
    ),
    "VNet": ({"spatial_dims": 2, "in_channels": 1, "out_channels": 2}, 1, 32, 48, 2),
    "HighResNet": ({"spatial_dims": 2, "in_channels": 1, "out_channels": 3}, 1, 32, 48, 2),
    "DenseNet121": ({"spatial_dims": 2, "in_channels": 1, "out_channels": 3}, 1, 64, 96, 2),
    "AutoEncoder": (
        {"spatial_dims": 2, "in_channels": 1, "out_channels": 1, "channels": (8, 12, 20), "strides": (2, 2, 2)},
        1,
        32,
        48,
        2,
    ),
    "ViT": (
        {
            "in_channels": 1,
            "img_size": 32,
            "patch_size": 8,
            "hidden_size": 48,
            "mlp_dim": 80,
            "num_layers": 2,
            "num_heads": 4,
            "classification": True,
            "num_classes": 5,
            "spatial_dims": 2,
        },
        1,
        32,
        32,
        2,
    ),
}


def _monai(name: str) -> Stranger:
    import importlib

    settings, channels, side, other, dimensions = MONAI[name]
    model = getattr(importlib.import_module("monai.networks.nets"), name)(**settings)
    return Stranger(model, (images(2, side, channels, dimensions),), (images(3, other, channels, dimensions),))


for _name in MONAI:
    NETWORKS[f"monai/{_name}"] = lambda name=_name: _monai(name)


# Sound ----------------------------------------------------------------------------------------------------------------


def waves(batch: int, length: int, channels: int = 1) -> Tensor:
    """Sound, [batch, channels, length]."""
    return torch.randn(batch, channels, length, generator=torch.Generator().manual_seed(0))


@stranger("conformer/conformer")
def _() -> Stranger:
    from conformer import Conformer

    model = Conformer(dim=48, depth=2, dim_head=12, heads=4, ff_mult=2, conv_expansion_factor=2, conv_kernel_size=5)
    return Stranger(model, (series(2, 7, 48),), (series(3, 11, 48),))


@stranger("demucs/demucs")
def _() -> Stranger:
    from demucs.demucs import Demucs

    model = Demucs(["a", "b"], audio_channels=2, channels=8, depth=3, dconv_mode=1, lstm_layers=0, resample=False, norm_starts=2)
    return Stranger(model, (waves(2, 1024, 2),), (waves(3, 2048, 2),))


@stranger("encodec/encoder-decoder")
def _() -> Stranger:
    from encodec.modules import SEANetDecoder, SEANetEncoder

    sizes = {"channels": 1, "dimension": 20, "n_filters": 6, "n_residual_layers": 1, "ratios": [4, 2], "lstm": 1}
    return Stranger(nn.Sequential(SEANetEncoder(**sizes), SEANetDecoder(**sizes)), (waves(2, 256),), (waves(3, 512),))


@stranger("vocos/backbone")
def _() -> Stranger:
    from vocos.models import VocosBackbone

    model = VocosBackbone(input_channels=20, dim=48, intermediate_dim=80, num_layers=3)
    return Stranger(model, (waves(2, 7, 20),), (waves(3, 11, 20),))


@stranger("openunmix/openunmix")
def _() -> Stranger:
    from openunmix.model import OpenUnmix

    model = OpenUnmix(nb_bins=33, nb_channels=2, hidden_size=24, nb_layers=2)
    return Stranger(model, (torch.rand(2, 2, 33, 7),), (torch.rand(3, 2, 33, 11),))


@stranger("speechbrain/ECAPA-TDNN")
def _() -> Stranger:
    from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN

    model = ECAPA_TDNN(20, channels=[32, 32, 32, 32, 96], attention_channels=12, se_channels=12, lin_neurons=24, res2net_scale=4)
    return Stranger(model, (series(2, 17, 20),), (series(3, 23, 20),))


@stranger("speechbrain/ConvTasNet-separator")
def _() -> Stranger:
    from speechbrain.lobes.models.conv_tasnet import MaskNet

    return Stranger(MaskNet(24, 16, 28, 3, 2, 2, C=2, norm_type="gLN", causal=False), (waves(2, 31, 24),), (waves(3, 37, 24),))


@stranger("torchaudio/Wav2Vec2")
def _() -> Stranger:
    from torchaudio.models import wav2vec2_model

    sizes = {
        "encoder_embed_dim": 48,
        "encoder_num_layers": 2,
        "encoder_num_heads": 4,
        "encoder_ff_interm_features": 80,
        "encoder_pos_conv_kernel": 8,
        "encoder_pos_conv_groups": 4,
    }
    off = {
        f"encoder_{name}": 0.0
        for name in ("projection_dropout", "attention_dropout", "ff_interm_dropout", "dropout", "layer_drop")
    }
    model = wav2vec2_model(
        "group_norm", [(20, 10, 5), (24, 3, 2)], False, encoder_layer_norm_first=False, aux_num_out=9, **sizes, **off
    )
    return Stranger(model, (waves(2, 640)[:, 0],), (waves(3, 960)[:, 0],))


@stranger("torchaudio/Conformer")
def _() -> Stranger:
    from torchaudio.models import Conformer

    model = Conformer(48, 4, 80, 2, 5)
    return Stranger(model, (series(2, 7, 48), torch.tensor([7, 5])), (series(3, 11, 48), torch.tensor([11, 9, 4])))


@stranger("torchaudio/ConvTasNet")
def _() -> Stranger:
    from torchaudio.models import ConvTasNet

    model = ConvTasNet(2, 16, 24, 3, 16, 28, 2, 2)
    return Stranger(model, (waves(2, 256),), (waves(3, 512),))


# Graphs, tables, time series ------------------------------------------------------------------------------------------


def _edges(nodes: int) -> Tensor:
    around = torch.arange(nodes)
    pairs = [torch.stack([around, (around + shift) % nodes]) for shift in (1, 3, 4)]
    return torch.cat(pairs, dim=1)


def _graph(name: str, **settings: Any) -> Stranger:
    import torch_geometric.nn as library

    model = getattr(library, name)(20, 24, 3, 7, **settings)
    return Stranger(model, (series(1, 13, 20)[0], _edges(13)), (series(1, 17, 20)[0], _edges(17)))


for _name in ("GCN", "GraphSAGE", "GIN", "GAT", "PNA", "EdgeCNN"):
    _extra: dict[str, Any] = {
        "GAT": {"heads": 3},
        "PNA": {"aggregators": ["mean", "max"], "scalers": ["identity"], "deg": torch.tensor([0, 0, 0, 13])},
    }.get(_name, {})
    NETWORKS[f"torch-geometric/{_name}"] = lambda name=_name, extra=_extra: _graph(name, **extra)


def _features() -> list[Any]:
    from deepctr_torch.inputs import DenseFeat, SparseFeat

    return [SparseFeat(f"c{i}", 11 + i, embedding_dim=8) for i in range(4)] + [DenseFeat("d", 3)]


def _rows(batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.cat(
        [torch.randint(0, 11, (batch, 4), generator=generator).float(), torch.randn(batch, 3, generator=generator)], dim=1
    )


def _click(name: str, **settings: Any) -> Stranger:
    import deepctr_torch.models as library

    model = getattr(library, name)(_features(), _features(), dnn_hidden_units=(24, 20), **settings)
    return Stranger(model, (_rows(5),), (_rows(7),))


for _name in ("DeepFM", "DCN", "AutoInt", "xDeepFM", "WDL", "FiBiNET", "DCNMix"):
    NETWORKS[f"deepctr-torch/{_name}"] = lambda name=_name: _click(name)


@stranger("tab-transformer-pytorch/FTTransformer")
def _() -> Stranger:
    from tab_transformer_pytorch import FTTransformer

    model = FTTransformer(categories=(5, 6, 7), num_continuous=4, dim=32, dim_out=3, depth=2, heads=4, dim_head=8)
    return Stranger(model, (tokens(5, 3, 5), series(1, 5, 4)[0]), (tokens(7, 3, 5), series(1, 7, 4)[0]), single=True)


@stranger("tab-transformer-pytorch/TabTransformer")
def _() -> Stranger:
    from tab_transformer_pytorch import TabTransformer

    model = TabTransformer(
        categories=(5, 6, 7), num_continuous=4, dim=32, dim_out=3, depth=2, heads=4, dim_head=8, mlp_act=nn.ReLU()
    )
    return Stranger(model, (tokens(5, 3, 5), series(1, 5, 4)[0]), (tokens(7, 3, 5), series(1, 7, 4)[0]), single=True)


@stranger("rtdl-revisiting-models/FTTransformer")
def _() -> Stranger:
    from rtdl_revisiting_models import FTTransformer

    sizes = FTTransformer.get_default_kwargs(1) | {"d_block": 40, "attention_n_heads": 4, "n_blocks": 2}
    model = FTTransformer(n_cont_features=4, cat_cardinalities=[5, 6], d_out=3, **sizes)
    return Stranger(model, (series(1, 5, 4)[0], tokens(5, 2, 5)), (series(1, 7, 4)[0], tokens(7, 2, 5)))


@stranger("rtdl-revisiting-models/ResNet")
def _() -> Stranger:
    from rtdl_revisiting_models import ResNet

    model = ResNet(d_in=9, d_out=3, n_blocks=3, d_block=40, d_hidden=None, d_hidden_multiplier=2.0, dropout1=0.0, dropout2=0.0)
    return Stranger(model, (series(1, 5, 9)[0],), (series(1, 7, 9)[0],))


@stranger("tabm/TabM")
def _() -> Stranger:
    from tabm import TabM

    model = TabM(n_num_features=9, d_out=3, n_blocks=2, d_block=40, dropout=0.0, k=4, start_scaling_init="random-signs")
    return Stranger(model, (series(1, 5, 9)[0],), (series(1, 7, 9)[0],))


@stranger("pytorch-tabnet/TabNet")
def _() -> Stranger:
    from pytorch_tabnet.tab_network import TabNet

    model = TabNet(9, 3, n_d=8, n_a=10, group_attention_matrix=torch.eye(9))
    return Stranger(model, (series(1, 6, 9)[0],), (series(1, 8, 9)[0],), single=True)


@stranger("itransformer/iTransformer")
def _() -> Stranger:
    from iTransformer import iTransformer

    model = iTransformer(num_variates=7, lookback_len=24, dim=40, depth=2, heads=4, dim_head=10, pred_length=6)
    return Stranger(model, (series(2, 24, 7),), (series(3, 24, 7),))


@stranger("pytorch-tcn/TCN")
def _() -> Stranger:
    from pytorch_tcn import TCN

    return Stranger(TCN(9, [16, 20, 24], kernel_size=3, causal=True), (waves(2, 17, 9),), (waves(3, 23, 9),))


@stranger("perceiver-pytorch/Perceiver")
def _() -> Stranger:
    from perceiver_pytorch import Perceiver

    sizes = {"num_latents": 6, "latent_dim": 40, "cross_heads": 1, "latent_heads": 4, "cross_dim_head": 12, "latent_dim_head": 10}
    model = Perceiver(input_channels=3, input_axis=2, num_freq_bands=4, max_freq=10.0, depth=2, num_classes=10, **sizes)
    return Stranger(model, (images(2, 8).permute(0, 2, 3, 1),), (images(3, 12).permute(0, 2, 3, 1),))


@stranger("soft-moe-pytorch/SoftMoE")
def _() -> Stranger:
    from soft_moe_pytorch import SoftMoE

    return Stranger(SoftMoE(dim=48, seq_len=16, num_experts=4), (series(2, 16, 48),), (series(3, 16, 48),))


@stranger("denoising-diffusion-pytorch/Unet")
def _() -> Stranger:
    from denoising_diffusion_pytorch import Unet

    model = Unet(16, dim_mults=(1, 2), flash_attn=False)
    return Stranger(model, (images(2, 16), torch.arange(2)), (images(3, 24), torch.arange(3)))


def _forecast(module: str, name: str, inputs: Callable[[int], dict[str, Tensor]], **settings: Any) -> Stranger:
    import importlib

    model = getattr(importlib.import_module(f"gluonts.torch.model.{module}.module"), name)(
        prediction_length=6, context_length=24, **settings
    )
    return Stranger(model, inputs(5), inputs(7))


def _past(batch: int) -> dict[str, Tensor]:
    return {"past_target": series(1, batch, 24)[0], "past_observed_values": torch.ones(batch, 24)}


@stranger("gluonts/PatchTST")
def _() -> Stranger:
    patches = {"patch_len": 8, "stride": 4, "padding_patch": "end", "num_feat_dynamic_real": 0, "scaling": "mean"}
    sizes = {"d_model": 40, "nhead": 4, "dim_feedforward": 56, "num_encoder_layers": 2, "dropout": 0.0, "activation": "relu"}
    return _forecast("patch_tst", "PatchTSTModel", _past, norm_first=False, **patches, **sizes)


@stranger("gluonts/DLinear")
def _() -> Stranger:
    return _forecast("d_linear", "DLinearModel", _past, hidden_dimension=20, kernel_size=5)


@stranger("gluonts/SimpleFeedForward")
def _() -> Stranger:
    return _forecast(
        "simple_feedforward",
        "SimpleFeedForwardModel",
        lambda batch: {"past_target": _past(batch)["past_target"]},
        hidden_dimensions=[20, 28],
    )
