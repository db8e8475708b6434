"""Operators that are run as what they are made of, so that the rules of their parts say what they demand.

Attention kernels are products and a softmax; higher-order operators (`flex_attention`, `scan`, `cond`) run code that the
network hands to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from string import ascii_letters
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._ops import HigherOrderOperator
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

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


class Steady(TorchFunctionMode):
    """Runs the same operators at every size, where torch's own code runs fewer for one head that is left than for many.

    `torch.einsum` of two tensors is one product of matrices: torch leaves axes of one position out of it. Attention of grouped
    queries repeats keys and values, once too: torch leaves that out where there are as many as queries.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one function."""
        if func is torch.einsum and isinstance(args[0], str) and not kwargs:
            operands = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
            if (plan := _Product.of(args[0], operands)) is not None:
                return plan.run(*operands)
        if func is F.scaled_dot_product_attention and kwargs and kwargs.get("enable_gqa") and len(args) >= 3:
            query, *pair = args[:3]
            repeated = [one.repeat_interleave(query.shape[-3] // one.shape[-3], -3) for one in pair]
            return func(query, *repeated, *args[3:], **{**kwargs, "enable_gqa": False})
        return func(*args, **kwargs or {})


@dataclass(frozen=True)
class _Product:
    """An einsum of two tensors; every axis has a letter."""

    first: str
    second: str
    out: str

    @classmethod
    def of(cls, equation: str, operands: Sequence[Tensor]) -> _Product | None:
        """None for what is no product over a common axis of two tensors: torch runs that as it is."""
        sides = equation.replace(" ", "").split("->")
        terms = sides[0].split(",")
        if len(sides) != 2 or len(terms) != 2 or len(operands) != 2:
            return None
        spare = [letter for letter in ascii_letters if letter not in equation]
        ranks = [operand.ndim - len(term.replace("...", "")) for term, operand in zip(terms, operands, strict=True)]
        open_ends = {rank for term, rank in zip(terms, ranks, strict=True) if "..." in term}
        if len(open_ends) > 1 or min(ranks) < 0 or max(ranks) > len(spare):
            return None  # ellipses of two lengths are broadcast
        letters = "".join(spare[: max(open_ends, default=0)])
        first, second, out = (term.replace("...", letters) for term in (*terms, sides[1]))
        sizes: dict[str, int] = {}
        for term, operand in ((first, operands[0]), (second, operands[1])):
            if len(term) != operand.ndim or len(set(term)) < len(term):
                return None
            if any(sizes.setdefault(letter, size) != size for letter, size in zip(term, operand.shape, strict=True)):
                return None
        summed = set(first) & set(second) - set(out)
        alone = (set(first) ^ set(second)) - set(out)
        return cls(first, second, out) if summed and not alone and len(set(out)) == len(out) else None

    def run(self, first: Tensor, second: Tensor) -> Tensor:
        """The product."""
        sizes = {**dict(zip(self.first, first.shape, strict=True)), **dict(zip(self.second, second.shape, strict=True))}
        both = [letter for letter in self.out if letter in self.first and letter in self.second]
        rows = [letter for letter in self.first if letter in self.out and letter not in both]
        columns = [letter for letter in self.second if letter in self.out and letter not in both]
        summed = [letter for letter in self.first if letter not in both and letter not in rows]

        def matrices(tensor: Tensor, letters: str, *axes: list[str]) -> Tensor:
            tensor = tensor.permute([letters.index(letter) for axis in axes for letter in axis])
            return tensor.reshape([prod(sizes[letter] for letter in axis) for axis in axes])

        if both:
            left = matrices(first, self.first, both, rows, summed)
            product = torch.bmm(left, matrices(second, self.second, both, summed, columns))
        else:
            product = torch.mm(matrices(first, self.first, rows, summed), matrices(second, self.second, summed, columns))
        order = [*both, *rows, *columns]
        return product.reshape([sizes[letter] for letter in order]).permute([order.index(letter) for letter in self.out])
