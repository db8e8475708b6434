"""Operators that are run as what they are made of, so that the rules of their parts say what they demand.

Attention kernels are products and a softmax; higher-order operators (`flex_attention`, `scan`, `cond`) run code that the
network hands to them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._ops import HigherOrderOperator

from resect.graph.rules import known

RESTRIDING = (torch.ops.aten.as_strided_.default,)
"""Operators that give a tensor other strides in place."""

KERNELS = frozenset(
    f"aten::_scaled_dot_product_{name}_attention{place}"
    for name in ("flash", "efficient", "cudnn", "fused", "fused_overrideable", "flash_for_mps")
    for place in ("", "_for_cpu", "_overrideable")
)
"""Kernels that compute attention from queries, keys and values [batch, heads, tokens, width] at once."""


@cache
def in_parts(func: Any) -> Callable[..., Any] | None:
    """What to run in the place of an operator; None for one that is run as it is."""
    if isinstance(func, HigherOrderOperator):
        return func.py_kernels.get(DispatchKey.CompositeExplicitAutograd)
    if func.namespace == "prim":  # what tensors are asked about themselves
        return None
    if func._schema.name in KERNELS:
        return lambda *args, **kwargs: _attention(func, args, kwargs)
    if not known(func.overloadpacket._qualified_op_name.replace("::", ".")) and func._can_decompose():
        return lambda *args, **kwargs: func.decompose(*args, **kwargs)
    return None


def _attention(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Attention in parts, with what else the kernel puts out left empty: sums and random states that training needs."""
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    query, key, value = given["query"], given["key"], given["value"]
    bias, scale = given.get("attn_mask", given.get("attn_bias")), given.get("scale")
    out, _ = torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, bias, 0.0, given.get("is_causal", False), scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    rest = [_blank(result.type, query) for result in func._schema.returns[1:]]
    return (out, *rest)


def _blank(kind: Any, like: Tensor) -> Any:
    return like.new_empty(0) if str(kind) == "Tensor" else 0
