"""A table of operator rules: what each is met by, what it lets be cut, what it refuses, held against zeros in float64.

A rule without an entry fails here. Every entry is a layer of twelve units, what is done to them, and a layer that reads them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import resect
from resect.errors import ModelError
from resect.graph import Graph, rules
from tests.graph.test_operators import Net, without_a_third

Function = Callable[[Any, Tensor], Tensor]
UNITS = 12
aten: Any = torch.ops.aten
ORDER = torch.tensor([2, 0, 1, 5, 3, 4])
"""Another order of the six rows."""
LOW = torch.arange(6)[:, None] < 4
"""A mask of rows."""
GRID = torch.linspace(-1, 1, 4 * 4 * 3, dtype=torch.float64).view(1, 4, 4, 3)
TRIANGLE = torch.eye(6, dtype=torch.float64) * 2 + torch.ones(6, 6, dtype=torch.float64).tril(-1)


@dataclass(frozen=True)
class Sample:
    """What is done to twelve units of a stage, and how wide the result is for the layer that reads it."""

    stage: str
    """`rows` [6, 12], `text` (two sequences of seven words), `sound` [2, 12, 16], `images` [2, 12, 8, 8], `volumes`."""
    function: Function
    width: int = UNITS
    refused: bool = False
    """Whether no unit may go, since the operator tells them apart or takes them together."""
    parts: Callable[[], dict[str, nn.Module]] = dict
    """Layers that the function uses, by name."""


def rows(function: Callable[[Tensor], Tensor], **more: Any) -> Sample:
    """A sample on rows, of a function without layers."""
    return Sample("rows", lambda net, h: function(h), **more)


def images(function: Callable[[Tensor], Tensor], **more: Any) -> Sample:
    """A sample on images, of a function without layers."""
    return Sample("images", lambda net, h: function(h), **more)


def sound(function: Callable[[Tensor], Tensor], **more: Any) -> Sample:
    """A sample on sound, of a function without layers."""
    return Sample("sound", lambda net, h: function(h), **more)


def volumes(function: Callable[[Tensor], Tensor], **more: Any) -> Sample:
    """A sample on volumes, of a function without layers."""
    return Sample("volumes", lambda net, h: function(h), **more)


def reordered(h: Tensor) -> Tensor:
    """The numbers of other rows, for every unit: [6, units]."""
    return ORDER[:, None].expand(-1, h.shape[1])


def network(sample: Sample) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A layer of twelve units, the sample's function, and a layer that reads what comes out; and an example."""
    dimensions = {"sound": 1, "images": 2, "volumes": 3}.get(sample.stage)
    enter: nn.Module
    leave: nn.Module
    if dimensions:
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        enter, leave = kind(3, UNITS, 1), kind(sample.width, 5, 1)
        x = torch.randn(2, 3, *[16 if dimensions == 1 else 8 if dimensions == 2 else 4] * dimensions)
    elif sample.stage == "text":
        enter, leave, x = nn.Identity(), nn.Linear(sample.width, 5), torch.arange(14).view(2, 7) % 11
    else:
        enter, leave, x = nn.Linear(9, UNITS), nn.Linear(sample.width, 5), torch.randn(6, 9)
    net = Net(lambda self, x: self.leave(sample.function(self, self.enter(x))), enter=enter, leave=leave, **sample.parts())
    return net.double().eval(), (x.double() if x.is_floating_point() else x,)


S = {
    # Values of units
    "aten.hardswish": rows(F.hardswish),
    "aten._prelu_kernel": Sample("rows", lambda net, h: net.slope(h), parts=lambda: {"slope": nn.PReLU(UNITS)}),
    "aten.log_sigmoid_forward": rows(F.logsigmoid),
    "aten.complex aten._conj aten.view_as_real": rows(
        lambda h: torch.view_as_real(torch.complex(h, h * 2).conj().resolve_conj()).sum(-1)
    ),
    "aten._neg_view": rows(lambda h: aten._neg_view(h) * 2),
    "aten.masked_fill_": rows(lambda h: aten.masked_fill_(h.clone(), LOW, 1.0)),
    "aten.masked_fill": rows(lambda h: h.masked_fill(LOW, 1.0)),
    "aten.zero_": rows(lambda h: aten.zero_(h.clone()) + h),
    "aten.nan_to_num": rows(torch.nan_to_num),
    "aten.polar": rows(lambda h: torch.view_as_real(torch.polar(h.abs(), h)).sum(-1)),
    "aten.empty_like": rows(lambda h: torch.empty_like(h).fill_(1.0) * h),
    "aten.rand_like": rows(lambda h: torch.rand_like(h) * 0 + h),
    "aten.bernoulli": rows(lambda h: torch.bernoulli(h.sigmoid()) * 0 + h),
    "aten.copy": rows(lambda h: aten.copy(h.clone(), h * 2)),
    "aten.copy_": rows(lambda h: h.clone().copy_(h * 2)),
    "aten.fill_": rows(lambda h: h.clone().fill_(2.0) * h),
    "aten.native_dropout": rows(lambda h: torch.native_dropout(h, 0.5, False)[0]),
    "aten.zeros_like": rows(lambda h: torch.zeros_like(h) + h),
    "aten.ones_like": rows(lambda h: torch.ones_like(h) * h),
    "aten.full_like": rows(lambda h: torch.full_like(h, 2.0) * h),
    "aten._to_copy": rows(lambda h: h.to(torch.float64, copy=True)),
    "aten.clone": rows(torch.clone),
    "aten.detach": rows(torch.detach),
    "aten.alias": rows(lambda h: aten.alias(h)),
    "aten.lift_fresh": rows(lambda h: aten.lift_fresh(h)),
    "aten.eq": rows(lambda h: (h == h.roll(1, 0)).double() + h),
    # New tensors: as wide as the units, or a number of their own
    "aten.new_full": rows(lambda h: h.new_full(h.shape, 2.0) * h),
    "aten.new_full, twelve in the code": rows(lambda h: h.new_full((UNITS,), 2.0) * h, refused=True),
    "aten.new_empty": rows(lambda h: h.new_empty(h.shape).fill_(2.0) * h),
    "aten.new_zeros": rows(lambda h: h.new_zeros(h.shape) + h),
    "aten.new_ones": rows(lambda h: h.new_ones(h.shape) * h),
    "aten.empty_strided": rows(lambda h: torch.empty_strided(h.shape, h.stride()).fill_(2.0) * h),
    "aten.new_empty_strided": rows(lambda h: h.new_empty_strided(h.shape, h.stride()).fill_(2.0) * h),
    "aten.full": rows(lambda h: torch.full(h.shape, 2.0) * h),
    "aten.zeros": rows(lambda h: torch.zeros(h.shape) + h),
    "aten.ones": rows(lambda h: torch.ones(h.shape) * h),
    "aten.ones, twelve in the code": rows(lambda h: torch.ones(UNITS) * h, refused=True),
    "aten.empty": rows(lambda h: torch.empty(h.shape).fill_(2.0) * h),
    "aten.scalar_tensor": rows(lambda h: torch.scalar_tensor(2.0) * h),
    "aten.arange": rows(lambda h: torch.arange(len(h))[:, None] * h),
    "aten.arange of units": rows(lambda h: torch.arange(h.shape[1]) * h, refused=True),
    "aten.linspace": rows(lambda h: torch.linspace(0, 1, len(h), dtype=torch.float64)[:, None] * h),
    "aten.rand": rows(lambda h: torch.rand(len(h))[:, None] * 0 + h),
    "aten.randn": rows(lambda h: torch.randn(len(h))[:, None] * 0 + h),
    "aten.randint": rows(lambda h: torch.randint(5, (len(h),))[:, None] * 0 + h),
    "aten.eye": rows(lambda h: torch.eye(len(h), dtype=torch.float64) @ h),
    "aten.tril_indices": rows(lambda h: torch.tril_indices(3, 3).sum() * h),
    # Shapes
    "aten.squeeze aten.unsqueeze": rows(lambda h: h.unsqueeze(1).squeeze(1)),
    "aten.squeeze_ aten.unsqueeze_": rows(lambda h: aten.squeeze_(aten.unsqueeze_(h.clone(), 1), 1)),
    "aten.view": rows(lambda h: h.view(3, 2, -1).view(6, -1)),
    "aten.view of heads": rows(lambda h: h.view(6, 4, -1).softmax(1).flatten(1)),
    "aten.view_copy": rows(lambda h: aten.view_copy(h, [6, -1])),
    "aten._unsafe_view": rows(lambda h: aten._unsafe_view(h, [6, -1])),
    "aten._reshape_alias": rows(lambda h: aten._reshape_alias(h, [6, h.shape[1]], list(h.stride()))),
    "aten.permute": rows(lambda h: h.permute(1, 0).permute(1, 0)),
    "aten.transpose": rows(lambda h: h.transpose(0, 1).transpose(0, 1)),
    "aten.transpose_": rows(lambda h: aten.transpose_(h.clone(), 0, 1).transpose(0, 1)),
    "aten.t": rows(lambda h: h.t().t()),
    "aten.t_": rows(lambda h: aten.t_(h.clone()).t()),
    "aten.expand": rows(lambda h: h[:, None].expand(6, 3, -1).sum(1)),
    "aten.expand_copy": rows(lambda h: aten.expand_copy(h[:, None], [6, 3, -1]).sum(1)),
    "aten.repeat": rows(lambda h: h.repeat(2, 1)),
    "aten.repeat of units, a number in the code": rows(lambda h: h.repeat(1, 2), width=2 * UNITS, refused=True),
    "aten.slice": rows(lambda h: h[1:]),
    "aten.slice of units, a number in the code": rows(lambda h: h[:, 3:], width=UNITS - 3, refused=True),
    "aten.slice_copy": rows(lambda h: aten.slice_copy(h, 0, 1, 5)),
    "aten.select": rows(lambda h: h.unsqueeze(0).select(0, 0)),
    "aten.select_copy": rows(lambda h: aten.select_copy(h.unsqueeze(0), 0, 0)),
    "aten.split": rows(lambda h: torch.cat(h.split(3, 0)[::-1])),
    "aten.split_with_sizes": rows(lambda h: torch.cat(h.split([2, 4], 0)[::-1])),
    "aten.split_with_sizes, numbers in the code": rows(lambda h: torch.cat(h.split([5, 7], 1)[::-1], 1), refused=True),
    "aten.unsafe_split": rows(lambda h: torch.cat(torch.unsafe_split(h, 3, 0)[::-1])),
    "aten.unbind aten.stack": rows(lambda h: torch.stack(h.unbind(0)[::-1], 0)),
    "aten.glu": rows(lambda h: F.glu(h, -1), width=UNITS // 2),
    "aten.cat": rows(lambda h: torch.cat([h, h.relu()], 1), width=2 * UNITS),
    "aten.view_as_complex": rows(lambda h: torch.view_as_real(torch.view_as_complex(torch.stack([h, h], -1)) * 1j).sum(-1)),
    "aten.as_strided": rows(lambda h: torch.as_strided(h, h.shape, h.stride())),
    "aten.as_strided_copy": rows(lambda h: aten.as_strided_copy(h, list(h.shape), list(h.stride()))),
    "aten.constant_pad_nd": rows(lambda h: F.pad(h, (0, 0, 1, 2))),
    "aten.constant_pad_nd of units": rows(lambda h: F.pad(h, (0, 4)), width=UNITS + 4),
    # Products
    "aten.mm": Sample("rows", lambda net, h: net.mix(h), parts=lambda: {"mix": nn.Linear(UNITS, UNITS, bias=False)}),
    "aten.addmm": Sample("rows", lambda net, h: net.mix(h), parts=lambda: {"mix": nn.Linear(UNITS, UNITS)}),
    "aten.bmm": rows(lambda h: torch.bmm(h[None], h[None].mT)[0], width=6),
    "aten.baddbmm": rows(lambda h: torch.baddbmm(torch.ones(1, 6, 6, dtype=h.dtype), h[None], h[None].mT)[0], width=6),
    "aten.mv": rows(lambda h: torch.mv(h.t(), torch.ones(6, dtype=h.dtype)) * h),
    "aten.dot": rows(lambda h: torch.dot(h[0], h[1]) * h),
    "aten.vdot": rows(lambda h: torch.vdot(h[0], h[1]) * h),
    "aten._trilinear": Sample("rows", lambda net, h: net.form(h, h), parts=lambda: {"form": nn.Bilinear(UNITS, UNITS, UNITS)}),
    "aten.convolution": Sample("images", lambda net, h: net.mix(h), parts=lambda: {"mix": nn.Conv2d(UNITS, UNITS, 3, groups=3)}),
    "aten.linalg_solve_triangular": rows(lambda h: torch.linalg.solve_triangular(TRIANGLE, h, upper=False)),
    "aten.triangular_solve": rows(lambda h: aten.triangular_solve(h, TRIANGLE, False)[0]),
    "aten.linalg_inv_ex": rows(lambda h: torch.linalg.inv(TRIANGLE) @ h),
    # Rows by number
    "aten.embedding": Sample("text", lambda net, x: net.table(x), parts=lambda: {"table": nn.Embedding(11, UNITS)}),
    "aten._embedding_bag_forward_only": Sample(
        "text", lambda net, x: net.bag(x), parts=lambda: {"bag": nn.EmbeddingBag(11, UNITS)}
    ),
    "aten.index_select": rows(lambda h: h.index_select(0, ORDER)),
    "aten.index_select of units": rows(lambda h: h.index_select(1, torch.arange(UNITS).flip(0)), refused=True),
    "aten.gather": rows(lambda h: h.gather(0, reordered(h))),
    "aten.index": rows(lambda h: h[ORDER]),
    "aten.scatter": rows(lambda h: torch.zeros_like(h).scatter(0, reordered(h), h)),
    "aten.scatter_": rows(lambda h: torch.zeros_like(h).scatter_(0, reordered(h), h)),
    "aten.scatter_add": rows(lambda h: torch.zeros_like(h).scatter_add(0, reordered(h), h)),
    "aten.scatter_add_": rows(lambda h: torch.zeros_like(h).scatter_add_(0, reordered(h), h)),
    "aten.scatter_reduce": rows(lambda h: torch.zeros_like(h).scatter_reduce(0, reordered(h), h, "amax", include_self=False)),
    "aten.index_add": rows(lambda h: torch.zeros_like(h).index_add(0, ORDER, h)),
    "aten.index_add_": rows(lambda h: torch.zeros_like(h).index_add_(0, ORDER, h)),
    "aten.index_put": rows(lambda h: torch.zeros_like(h).index_put((ORDER,), h)),
    "aten._unsafe_index_put": rows(lambda h: aten._unsafe_index_put(torch.zeros_like(h), [ORDER], h)),
    "aten.nonzero": rows(lambda h: h[(torch.arange(6) > 2).nonzero()[:, 0]]),
    "aten.masked_scatter": rows(lambda h: h.masked_scatter(LOW, h * 2)),
    "aten.masked_scatter_": rows(lambda h: aten.masked_scatter_(h.clone(), LOW, h * 2)),
    "aten.masked_select": rows(lambda h: h + h.masked_select(h > 0).sum(), refused=True),
    "aten.segment_reduce": rows(lambda h: torch.segment_reduce(h, "sum", lengths=torch.tensor([2, 4]), axis=0)),
    # Over rows, and over units
    "aten.mean": rows(lambda h: h.mean(0) + h),
    "aten.mean of units": rows(lambda h: h.mean(1, keepdim=True) + h, refused=True),
    "aten.var_mean": rows(lambda h: torch.var_mean(h, 0)[0] + h),
    "aten.var": rows(lambda h: h.var(0) + h),
    "aten.var of units": rows(lambda h: h.var(1, keepdim=True) + h, refused=True),
    "aten.std": rows(lambda h: aten.std.dim(h, [0]) + h),
    "aten.linalg_vector_norm": rows(lambda h: torch.linalg.vector_norm(h, dim=0) + h),
    "aten.norm": rows(lambda h: aten.norm.ScalarOpt_dim(h, 2, [0]) + h),
    "aten.sum": rows(lambda h: h.sum(0) + h),
    "aten.amin": rows(lambda h: h.amin(0) + h),
    "aten.min": rows(lambda h: h.min(0)[0] + h),
    "aten.argmin": rows(lambda h: h.argmin(0) * h),
    "aten.prod": rows(lambda h: h.prod(0) + h),
    "aten.prod of units": rows(lambda h: h.prod(1, keepdim=True) + h, refused=True),
    "aten.any": rows(lambda h: (h > 0).any(0) * h),
    "aten.all": rows(lambda h: (h > 0).all(0) * h),
    "aten.logsumexp": rows(lambda h: h.logsumexp(0) + h),
    "aten.max": rows(lambda h: h.max(0)[0] + h),
    "aten.max of units": rows(lambda h: h.max(1, keepdim=True)[0] + h, refused=True),
    "aten.amax": rows(lambda h: h.amax(0) + h),
    "aten.argmax": rows(lambda h: h.argmax(0) * h),
    "aten.topk": rows(lambda h: h.topk(3, 0)[0].sum(0) + h),
    "aten.topk of units": rows(lambda h: h.topk(3, 1)[0], width=3, refused=True),
    "aten._softmax": rows(lambda h: h.softmax(0)),
    "aten._softmax of units": rows(lambda h: h.softmax(1), refused=True),
    "aten._safe_softmax": rows(lambda h: aten._safe_softmax(h, 0)),
    "aten._log_softmax": rows(lambda h: h.log_softmax(0)),
    "aten.cumsum": rows(lambda h: h.cumsum(0)),
    "aten.cumsum of units": rows(lambda h: h.cumsum(1), refused=True),
    "aten.cumprod": rows(lambda h: h.cumprod(0)),
    "aten.flip": rows(lambda h: h.flip(0)),
    "aten.flip of units": rows(lambda h: h.flip(1), refused=True),
    "aten.roll": rows(lambda h: h.roll(1, 0)),
    "aten.sort": rows(lambda h: h.sort(0)[0]),
    "aten.tril": rows(lambda h: torch.ones(6, 6, dtype=h.dtype).tril() @ h),
    "aten.triu": rows(lambda h: torch.ones(6, 6, dtype=h.dtype).triu() @ h),
    "aten.index_reduce": rows(lambda h: torch.zeros_like(h).index_reduce(0, ORDER, h, "mean")),
    # Norms
    "aten.native_layer_norm": Sample("rows", lambda net, h: net.norm(h), parts=lambda: {"norm": nn.LayerNorm(UNITS)}),
    "aten.mean in a norm": Sample("rows", lambda net, h: net.norm(h), parts=lambda: {"norm": nn.RMSNorm(UNITS)}),
    "aten.native_group_norm": Sample("images", lambda net, h: net.norm(h), parts=lambda: {"norm": nn.GroupNorm(3, UNITS)}),
    "aten.native_batch_norm": Sample(
        "images",
        lambda net, h: aten.native_batch_norm(
            h, net.norm.weight, net.norm.bias, net.norm.running_mean, net.norm.running_var, False, 0.1, 1e-5
        )[0],
        parts=lambda: {"norm": nn.BatchNorm2d(UNITS)},
    ),
    "aten._native_batch_norm_legit_no_training": Sample(
        "images",
        lambda net, h: aten._native_batch_norm_legit_no_training(
            h, net.norm.weight, net.norm.bias, net.norm.running_mean, net.norm.running_var, 0.1, 1e-5
        )[0],
        parts=lambda: {"norm": nn.BatchNorm2d(UNITS)},
    ),
    "aten._native_batch_norm_legit": Sample(
        "images",
        lambda net, h: aten._native_batch_norm_legit.no_stats(h, net.norm.weight, net.norm.bias, True, 0.1, 1e-5)[0],
        parts=lambda: {"norm": nn.BatchNorm2d(UNITS)},
    ),
    "aten._weight_norm_interface": Sample(
        "rows",
        lambda net, h: F.linear(h, torch._weight_norm(net.mix.weight, net.size.weight, 0)),
        parts=lambda: {"mix": nn.Linear(UNITS, UNITS), "size": nn.Linear(1, UNITS)},
    ),
    # Positions of sound, images, volumes
    "aten.reflection_pad1d": sound(lambda h: F.pad(h, (2, 1), mode="reflect")),
    "aten.replication_pad1d": sound(lambda h: F.pad(h, (2, 1), mode="replicate")),
    "aten.upsample_linear1d": sound(lambda h: F.interpolate(h, scale_factor=2, mode="linear")),
    "aten.upsample_nearest1d": sound(lambda h: F.interpolate(h, scale_factor=2)),
    "aten._upsample_nearest_exact1d": sound(lambda h: F.interpolate(h, scale_factor=2, mode="nearest-exact")),
    "aten.unfold": sound(lambda h: h.unfold(2, 4, 2).mean(-1)),
    "aten.unfold of units": sound(lambda h: h.unfold(1, 4, 4).sum(-1), width=3, refused=True),
    "aten.unfold_backward": sound(lambda h: aten.unfold_backward(h.unfold(2, 4, 4), list(h.shape), 2, 4, 4)),
    "aten._fft_r2c aten._fft_c2r": sound(lambda h: torch.fft.irfft(torch.fft.rfft(h) * 2)),
    "aten._fft_c2c": sound(lambda h: torch.view_as_real(torch.fft.fft(torch.complex(h, h))).sum(-1)),
    "aten._fft_r2c of units": sound(lambda h: torch.fft.rfft(h, dim=1).abs(), width=7, refused=True),
    "aten.reflection_pad2d": images(lambda h: F.pad(h, (2, 1, 1, 1), mode="reflect")),
    "aten.replication_pad2d": images(lambda h: F.pad(h, (2, 1, 1, 1), mode="replicate")),
    "aten._upsample_bilinear2d_aa": images(lambda h: F.interpolate(h, size=(5, 5), mode="bilinear", antialias=True)),
    "aten._upsample_bicubic2d_aa": images(lambda h: F.interpolate(h, size=(5, 5), mode="bicubic", antialias=True)),
    "aten.upsample_bilinear2d": images(lambda h: F.interpolate(h, scale_factor=2, mode="bilinear")),
    "aten.upsample_bicubic2d": images(lambda h: F.interpolate(h, scale_factor=2, mode="bicubic")),
    "aten.upsample_nearest2d": images(lambda h: F.interpolate(h, scale_factor=2)),
    "aten._upsample_nearest_exact2d": images(lambda h: F.interpolate(h, scale_factor=2, mode="nearest-exact")),
    "aten._adaptive_avg_pool2d": images(lambda h: F.adaptive_avg_pool2d(h, 3)),
    "aten.adaptive_max_pool2d": images(lambda h: F.adaptive_max_pool2d(h, 3)),
    "aten.avg_pool2d": images(lambda h: F.avg_pool2d(h, 2)),
    "aten.max_pool2d_with_indices": images(lambda h: F.max_pool2d(h, 2)),
    "aten.fractional_max_pool2d": images(
        lambda h: F.fractional_max_pool2d(h, 2, output_size=3, _random_samples=torch.full((*h.shape[:2], 2), 0.5).double())
    ),
    "aten.pixel_shuffle": images(lambda h: F.pixel_shuffle(h, 2), width=3),
    "aten.pixel_unshuffle": images(lambda h: F.pixel_unshuffle(h, 2), width=4 * UNITS),
    "aten.im2col aten.col2im": images(lambda h: F.fold(F.unfold(h, 2, stride=2), (8, 8), 2, stride=2)),
    "aten.native_channel_shuffle": Sample("images", lambda net, h: aten.native_channel_shuffle(h, net.number)),
    "aten.channel_shuffle": Sample("images", lambda net, h: F.channel_shuffle(h, net.number)),
    "aten.grid_sampler_2d": images(lambda h: F.grid_sample(h, GRID[..., :2].expand(len(h), -1, -1, -1), align_corners=False)),
    "aten.affine_grid_generator": images(
        lambda h: F.grid_sample(h, F.affine_grid(torch.eye(2, 3).double().repeat(len(h), 1, 1), [len(h), 3, 4, 4], False))
    ),
    "aten.max_unpool2d": images(lambda h: F.max_unpool2d(*F.max_pool2d(h, 2, return_indices=True), [2, 2])),
    "aten.reflection_pad3d": volumes(lambda h: F.pad(h, (1, 1, 1, 1, 1, 1), mode="reflect")),
    "aten.replication_pad3d": volumes(lambda h: F.pad(h, (1, 1, 1, 1, 1, 1), mode="replicate")),
    "aten.upsample_trilinear3d": volumes(lambda h: F.interpolate(h, scale_factor=2, mode="trilinear")),
    "aten.upsample_nearest3d": volumes(lambda h: F.interpolate(h, scale_factor=2)),
    "aten._upsample_nearest_exact3d": volumes(lambda h: F.interpolate(h, scale_factor=2, mode="nearest-exact")),
    "aten._adaptive_avg_pool3d": volumes(lambda h: F.adaptive_avg_pool3d(h, 2)),
    "aten.adaptive_max_pool3d": volumes(lambda h: F.adaptive_max_pool3d(h, 2)),
    "aten.avg_pool3d": volumes(lambda h: F.avg_pool3d(h, 2)),
    "aten.max_pool3d_with_indices": volumes(lambda h: F.max_pool3d(h, 2)),
    "aten.fractional_max_pool3d": volumes(
        lambda h: F.fractional_max_pool3d(h, 2, output_size=2, _random_samples=torch.full((*h.shape[:2], 3), 0.5).double())
    ),
    "aten.grid_sampler_3d": volumes(
        lambda h: F.grid_sample(h, GRID[:, None].expand(len(h), -1, -1, -1, -1), align_corners=False)
    ),
    "aten.max_unpool3d": volumes(lambda h: F.max_unpool3d(*F.max_pool3d(h, 2, return_indices=True), [2, 2, 2])),
}
ELSEWHERE = {"aten.cudnn_batch_norm", "aten.cudnn_grid_sampler", "aten._fused_rms_norm", "aten._embedding_bag"}
"""Rules for operators of GPUs, and of networks that train."""


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the rules that are used meanwhile."""
    used: set[str] = set()
    apply = rules.apply

    def noted(call: Any, overload: Any) -> Any:
        used.add(call.name if call.name in rules._RULES else call.name.removesuffix("_"))
        return apply(call, overload)

    monkeypatch.setattr(rules, "apply", noted)
    return used


@pytest.mark.filterwarnings("ignore:index_reduce:UserWarning", "ignore:.*triangular_solve is deprecated:UserWarning")
@pytest.mark.filterwarnings("ignore:Default grid_sample and affine_grid:UserWarning")
@pytest.mark.parametrize("name", S)
def test_the_rule_is_right(name: str, met: set[str]) -> None:
    torch.manual_seed(0)
    sample = S[name]
    net, inputs = network(sample)
    graph = resect.trace(net, inputs)
    wanted = {word.rstrip(",") for word in name.split() if word.startswith("aten.")}
    assert wanted <= met, f"met {sorted(met)}"
    small, zeros = copy.deepcopy(net), zeroed(net, graph)
    if any(group.mixed for group in graph.groups):  # statistics over what stays
        resect.mask(zeros, without_a_third(graph), graph)
    source = tuple(f"{name}.weight" for name in ("enter", "table", "bag"))
    offered = [group for group in graph.groups if any(member.parameter in source for member in group.members)]
    try:
        resect.cut(small, without_a_third(graph), graph)
    except ModelError:
        assert sample.refused, "refused at the cut"
        return
    assert bool(offered) is not sample.refused, f"{offered}, frozen for {sorted({one.reason for one in graph.frozen})}"
    torch.testing.assert_close(small(*inputs), zeros(*inputs), rtol=1e-9, atol=1e-12)
    other = tuple(torch.cat([x, x[:1] if sample.stage != "rows" else x[:0]]) for x in inputs)
    torch.testing.assert_close(small(*other), zeros(*other), rtol=1e-9, atol=1e-12)


def zeroed(net: nn.Module, graph: Graph) -> nn.Module:
    """A copy of a network with zeros where the first third of every group's units was."""
    zeros = copy.deepcopy(net)
    state = {**dict(zeros.named_parameters()), **dict(zeros.named_buffers())}
    for group in graph.groups:
        for member in group.members:
            if (member.parameter, member.axis) not in graph.spared:
                state[member.parameter].data.index_fill_(member.axis, member.index[: group.units // 3].flatten(), 0)
    return zeros


def test_every_rule_has_an_entry() -> None:
    named = {word.rstrip(",") for name in S for word in name.split() if word.startswith("aten.")}
    assert named <= set(rules._RULES)
    missing = set(rules._RULES) - named - ELSEWHERE
    taken_apart = {name for name in missing if is_taken_apart(name)}
    assert missing == taken_apart


def is_taken_apart(name: str) -> bool:
    """Whether torch runs an operator as what it is made of before a rule could see it."""
    packet = getattr(torch.ops.aten, name.removeprefix("aten."))
    overloads = [getattr(packet, overload)._schema for overload in packet.overloads()]
    wanted = [schema for schema in overloads if not schema.overload_name.endswith("out")]
    names = [f"{schema.name}.{schema.overload_name}".rstrip(".") for schema in wanted]
    return all(torch._C._dispatch_has_kernel_for_dispatch_key(one, "CompositeImplicitAutograd") for one in names)
