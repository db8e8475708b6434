"""Cuts that would compute something else, each in a small network: kept whole, refused, or right."""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import resect
from resect.errors import ModelError
from resect.graph import Graph
from resect.plan import Kept, Plan
from resect.surgery.modeling_resect import resize
from tests.graph.test_operators import Net, rows, without_a_third, words


def agrees(net: nn.Module, *inputs: Tensor, then: tuple[Tensor, ...] | None = None) -> bool:
    """Whether the cut network computes what the dense one does with zeros, on the example or other inputs; or is refused."""
    graph = resect.trace(net, inputs)
    zeros, small = copy.deepcopy(net), copy.deepcopy(net)
    state = {**dict(zeros.named_parameters()), **dict(zeros.named_buffers())}
    for group in graph.groups:
        for member in group.members:
            gone = member.index[: group.units // 3].flatten()
            state[member.parameter].data.index_fill_(member.axis, gone, 0)
    try:
        resect.cut(small, without_a_third(graph), graph)
    except ModelError:
        return True
    return torch.allclose(zeros(*(then or inputs)), small(*(then or inputs)))


def removing(graph: Graph, name: str) -> Plan:
    """The plan without a block or a sub-layer."""
    group = graph.group(name)
    return Plan(groups={name: Kept(kind=group.kind, layer=group.layer, units=1, keep=())})


def towers(product: Callable[[Any, Tensor, Tensor], Tensor]) -> nn.Module:
    return Net(
        lambda self, x, y: product(self, self.q(x), self.k(y)), q=nn.Linear(9, 32), k=nn.Linear(7, 32)
    ).double()


class TestNumbersThatFollowSizes:
    @pytest.mark.parametrize(
        "scale",
        [
            lambda self, q: torch.full_like(q[0, 0], q.shape[-1]),
            lambda self, q: q.new_full((), q.size(1)),
            lambda self, q: torch.as_tensor(q.shape[1]),
            lambda self, q: torch.tensor([self.q.out_features]),
            lambda self, q: torch.zeros(()).fill_(self.k.out_features),
        ],
    )
    def test_as_values_of_tensors(self, scale: Callable[[Any, Tensor], Tensor]) -> None:
        net = towers(lambda self, q, k: q @ k.t() / scale(self, q).to(q.dtype))
        assert agrees(net, rows(), rows(7))

    def test_read_where_the_example_does_not_go(self) -> None:
        class Attend(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.n_heads = self.n_cached_heads = 4
                self.qkv, self.o = nn.Linear(24, 72), nn.Linear(24, 24)

            def forward(self, x: Tensor) -> Tensor:
                b, t, _ = x.shape
                q, k, v = self.qkv(x).view(b, t, 3, self.n_heads, 6).permute(2, 0, 3, 1, 4)
                return self.o(F.scaled_dot_product_attention(q, k, v, scale=0.4).transpose(1, 2).reshape(b, t, -1))

        net = Net(lambda self, ids: self.h(self.a(self.e(ids))), e=nn.Embedding(31, 24), a=Attend(), h=nn.Linear(24, 7))
        graph = resect.trace(net, (words(),))
        (heads,) = graph.of_kind("heads")
        kept = Kept(kind="heads", layer=heads.layer, units=4, keep=(1, 3))
        resect.cut(net, Plan(groups={heads.name: kept}), graph)
        attend: Any = net.a
        assert (attend.n_heads, attend.n_cached_heads) == (2, 2)


class TestOutputs:
    @dataclasses.dataclass
    class Record:
        logits: Tensor
        inside: dict[str, list[Tensor]]

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda h, y: TestOutputs.Record(y, {"h": [h]}),
            lambda h, y: types.SimpleNamespace(y=y, more=(h,)),
            lambda h, y: {"y": y, "h": {h}},
        ],
    )
    def test_inside_objects(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        def forward(self: Any, x: Tensor) -> Any:
            h = self.a(x).relu()
            return wrap(h, self.b(h))

        graph = resect.trace(Net(forward, a=nn.Linear(9, 32), b=nn.Linear(32, 10)), (torch.zeros(5, 9),))
        assert not graph.groups

    def test_handed_out_through_an_argument_or_an_attribute(self) -> None:
        def into_a_list(self: Any, x: Tensor, found: list[Tensor]) -> Tensor:
            found.append(self.a(x).relu())
            return self.b(found[0])

        def as_an_attribute(self: Any, x: Tensor) -> Tensor:
            self.features = self.a(x).relu()
            return self.b(self.features)

        parts = {"a": nn.Linear(9, 32), "b": nn.Linear(32, 5)}
        x = torch.zeros(5, 9)
        assert not resect.trace(Net(into_a_list, **parts), (x, [])).groups
        assert not resect.trace(Net(as_an_attribute, **parts), (x,)).groups

    def test_numbers_of_winners(self) -> None:
        def forward(self: Any, x: Tensor, *, put_out: bool = True) -> Any:
            number = (self.e(x) @ self.code.weight.t()).argmax(-1)
            found = self.d(self.code.weight[number])
            return (found, number) if put_out else found

        parts = {"e": nn.Linear(9, 16), "code": nn.Embedding(12, 16), "d": nn.Linear(16, 9)}
        kept = resect.trace(Net(forward, **parts), (torch.zeros(5, 9),))
        assert not kept.of_kind("experts")
        free = Net(lambda self, x: forward(self, x, put_out=False), **parts)
        assert [group.units for group in resect.trace(free, (torch.zeros(5, 9),)).of_kind("experts")] == [12]


class TestProducts:
    @pytest.mark.parametrize(
        "bend",
        [torch.sigmoid, torch.cos, F.softplus, torch.exp, lambda t: F.elu(t) + 1],
        ids=["sigmoid", "cos", "softplus", "exp", "elu + 1"],
    )
    def test_of_two_that_are_not_zero_where_masked(self, bend: Callable[[Tensor], Tensor]) -> None:
        net = towers(lambda self, q, k: bend(q) @ bend(k).t())
        assert agrees(net, rows(), rows(7))
        assert not resect.trace(net, (rows(), rows(7))).groups

    @pytest.mark.parametrize("bend", [torch.relu, torch.tanh, F.silu, lambda t: t], ids=["relu", "tanh", "silu", "none"])
    def test_of_two_that_are(self, bend: Callable[[Tensor], Tensor]) -> None:
        net = towers(lambda self, q, k: bend(q) @ bend(k).t())
        assert [group.units for group in resect.trace(net, (rows(), rows(7))).groups] == [32]
        assert agrees(net, rows(), rows(7))

    def test_one_side_is_enough(self) -> None:
        net = towers(lambda self, q, k: q.sigmoid() @ k.relu().t())
        assert [group.units for group in resect.trace(net, (rows(), rows(7))).groups] == [32]
        assert agrees(net, rows(), rows(7))

    def test_over_rows_that_passed_a_bias(self) -> None:
        def forward(self: Any, x: Tensor) -> Tensor:
            memory = self.m.weight
            return self.o(self.q(x) @ (self.k(memory).t() @ self.v(memory)))

        parts = {name: nn.Linear(9, 16) for name in "qkv"}
        net = Net(forward, m=nn.Embedding(13, 9), o=nn.Linear(16, 5), **parts).double()
        assert 13 not in [group.units for group in resect.trace(net, (rows(),)).groups]
        assert agrees(net, rows())

    def test_square_weights_on_one_stream(self) -> None:
        parts = {"a": nn.Linear(9, 24), "m": nn.Linear(24, 24), "b": nn.Linear(24, 5)}
        net = Net(lambda self, x: self.b(self.m(self.a(x)) + self.a(x)), **parts).double()
        assert [group.units for group in resect.trace(net, (rows(),)).groups] == [24]
        assert agrees(net, rows())


class TestTheModelIsHandedBack:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(9, 32), nn.Linear(32, 5)
            self.register_buffer("calls", torch.zeros(1))
            self.register_buffer("mean", torch.zeros(9))
            self.calls: Tensor
            self.mean: Tensor

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
            with torch.no_grad():
                self.a.weight.clamp_(-0.1, 0.1)
            h = self.a(x - self.mean).relu()
            if h.sum() > 1e9:
                raise RuntimeError("too large")
            return self.b(h)

    @pytest.mark.parametrize("large", [False, True], ids=["runs", "stops"])
    def test_what_a_run_on_real_numbers_writes(self, large: bool) -> None:
        net = self.Counting().eval()
        before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        example = torch.full((5, 9), 1e12) if large else torch.randn(5, 9)
        if large:
            net.a.weight.data.fill_(0.1)
            before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        try:
            resect.trace(net, (example,))
        except ModelError:
            assert large
        assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())

    def test_modes_that_merge_weights(self) -> None:
        class Merged(nn.Linear):
            delta = 1e-3

            def train(self, mode: bool = True) -> Merged:
                with torch.no_grad():
                    self.weight += self.delta * (self.training - mode)
                return super().train(mode)

        net = nn.Sequential(Merged(9, 32), nn.ReLU(), nn.Linear(32, 5)).eval()
        weight = net.get_parameter("0.weight")
        before = weight.detach().clone()
        resect.trace(net, (torch.zeros(3, 9),))
        assert torch.equal(weight, before)
        assert not net[0].training

    @pytest.mark.parametrize("stops", [False, True])
    def test_what_modules_hold_that_is_no_buffer(self, stops: bool) -> None:
        class Holding(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.plain = nn.Linear(9, 5), torch.zeros(3)
                self.seen: list[int] = []
                self.names: set[str] = set()

            def forward(self, x: Tensor) -> Tensor:
                self.plain.add_(1)
                self.seen.append(len(x))
                self.names.add("x")
                if x.isnan().any() or stops:
                    raise RuntimeError("stopped")
                found: Tensor = self.a(x)
                return found

        net = Holding()
        if stops:
            with pytest.raises(ModelError, match="stopped"):
                resect.trace(net, (torch.zeros(3, 9),))
        else:
            resect.trace(net, (torch.zeros(3, 9),))
        assert (net.plain.tolist(), net.seen, net.names) == ([0.0, 0.0, 0.0], [], set())

    def test_mappings_that_cannot_be_written(self) -> None:
        class Frozen(OrderedDict[str, int]):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                self.done = True

            def __setitem__(self, key: str, value: int) -> None:
                if hasattr(self, "done"):
                    raise TypeError("settings cannot be changed")
                super().__setitem__(key, value)

            def clear(self) -> None:
                raise TypeError("settings cannot be changed")

        net = nn.Sequential(nn.Linear(9, 32), nn.Linear(32, 5))
        net.settings = Frozen({"width": 8})  # type: ignore[assignment]
        assert len(resect.trace(net, (torch.zeros(3, 9),)).groups) == 1
        assert net.settings == {"width": 8}


class TestWaysThatWereNotSeen:
    def test_what_only_training_reads_is_cut_with_it(self) -> None:
        def forward(self: Any, x: Tensor) -> Tensor:
            h = self.a(x).relu()
            y: Tensor = self.c(self.b(h).relu())
            return y + self.aux(h) if self.training else y

        parts = {"a": nn.Linear(9, 32), "b": nn.Linear(32, 24), "c": nn.Linear(24, 5), "aux": nn.Linear(32, 5)}
        net = Net(forward, **parts).double().train()
        graph = resect.trace(net, (rows(),))
        assert ("aux.weight", 1) in {(m.parameter, m.axis) for group in graph.groups for m in group.members}
        assert agrees(net, rows())

    def test_a_choice_by_value(self) -> None:
        def forward(self: Any, x: Tensor) -> Tensor:
            h = self.a(x)
            found: Tensor = self.c(h.softmax(-1) if x.mean() > 0 else h)
            return found

        net = Net(forward, a=nn.Linear(9, 32), c=nn.Linear(32, 5)).double()
        x = rows().abs()
        assert agrees(net, -x, then=(x,))
        assert any("one of its ways was seen" in one.reason for one in resect.trace(net, (-x,)).frozen)

    def test_a_choice_before_anything_is_computed_keeps_nothing_whole(self) -> None:
        def forward(self: Any, x: Tensor) -> Tensor:
            scale = 1.0 if x.isnan().any() else 2.0
            return self.b(self.a(x).relu() * scale)

        graph = resect.trace(Net(forward, a=nn.Linear(9, 32), b=nn.Linear(32, 5)), (torch.randn(5, 9),))
        assert [group.units for group in graph.groups] == [32]


class Block(nn.Module):
    """A norm and two layers on a stream; a counter that others may read."""

    def __init__(self) -> None:
        super().__init__()
        self.n, self.inner = nn.LayerNorm(24), Inner()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.n(x))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.u, self.d, self.seen = nn.Linear(24, 40), nn.Linear(40, 24), 0

    def reset(self) -> None:
        self.seen = 0

    @property
    def dtype(self) -> torch.dtype:
        return self.u.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.shape[1]
        return self.d(self.u(x).relu())


class Stack(nn.Module):
    def __init__(self, *, reads: bool) -> None:
        super().__init__()
        self.e, self.places = nn.Embedding(31, 24), nn.Parameter(torch.randn(40, 24))
        self.blocks, self.o, self.reads = nn.ModuleList(Block() for _ in range(3)), nn.Linear(24, 7), reads

    def forward(self, ids: Tensor) -> Tensor:
        first: Any = self.blocks[0].inner
        at = first.seen if self.reads else 0
        x = self.e(ids) + self.places[at : at + ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.o(x)


class TestDepth:
    def test_a_sub_layer_whose_counter_others_read_stays(self) -> None:
        graph = resect.trace(Stack(reads=True), (words(),))
        assert {group.name for group in graph.of_kind("sublayers")} == {f"blocks.{n}.inner" for n in (1, 2)}
        assert "blocks.0" not in {group.name for group in graph.of_kind("blocks")}

    def test_a_counter_that_nobody_reads_goes_with_its_methods_left(self) -> None:
        net = Stack(reads=False)
        graph = resect.trace(net, (words(),))
        assert len(graph.of_kind("sublayers")) == 3
        resect.cut(net, removing(graph, "blocks.1.inner"), graph)
        inner: Any = net.blocks[1].inner
        inner.reset()
        assert inner.seen == 0
        assert inner.dtype == inner.u.weight.dtype == torch.float32
        assert sum(p.numel() for p in inner.parameters()) == 0
        with pytest.raises(AttributeError, match="nothing"):
            inner.nothing  # noqa: B018

    def test_hooks_that_are_older_than_the_mask_see_the_mask(self) -> None:
        class Kept(Stack):
            def __init__(self) -> None:
                super().__init__(reads=False)
                for block in self.blocks:
                    block.register_forward_hook(self.keep)

            def keep(self, block: nn.Module, given: Any, result: Tensor) -> None:
                self.last = result

            def forward(self, ids: Tensor) -> Tensor:
                super().forward(ids)
                return self.o(self.last)

        net, ids = Kept().double(), words()
        graph = resect.trace(net, (ids,))
        for group in graph.of_kind("blocks"):
            plan = removing(graph, group.name)
            small = Kept().double()
            small.load_state_dict(net.state_dict())
            with resect.masked(net, plan, graph):
                expected = net(ids)
            torch.testing.assert_close(resect.cut(small, plan, resect.trace(small, (ids,)))(ids), expected)


class Plain(nn.Module):
    """A norm without weights."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


@pytest.mark.parametrize("last", [False, True])
def test_a_norm_that_is_used_on_several_widths(last: bool) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.n(self.a(self.n(x))))
        return self.n(y) if last else y

    net = Net(forward, n=Plain(), a=nn.Linear(9, 32), b=nn.Linear(32, 5)).double()
    graph = resect.trace(net, (rows(),))
    (group,) = graph.groups
    plan = Plan(groups={group.name: Kept(kind=group.kind, layer=group.layer, units=32, keep=tuple(range(8, 32)))})
    with resect.masked(net, plan, graph):
        expected = [net(rows_) for rows_ in (X, X)]
    small = resect.cut(copy.deepcopy(net), plan, graph)
    for one in expected:
        torch.testing.assert_close(small(X), one)


X = rows()


def test_a_table_as_long_as_the_text_is_counted_whole() -> None:
    def forward(self: Any, ids: Tensor) -> Tensor:
        found: Tensor = self.o(self.u(self.e(ids) + self.places.weight).relu())
        return found

    net = Net(forward, e=nn.Embedding(31, 24), places=nn.Embedding(16, 24), u=nn.Linear(24, 40), o=nn.Linear(40, 5))
    graph = resect.trace(net, (torch.zeros(2, 16, dtype=torch.long),))
    assert graph.parameter_count() == sum(p.numel() for p in net.parameters())
    plan = without_a_third(graph)
    small = resect.cut(net, plan, graph)
    assert graph.parameter_count(plan.removed()) == sum(p.numel() for p in small.parameters())


def test_a_padding_row_at_the_end_of_a_cut_table() -> None:
    net = Net(lambda self, ids: self.o(self.e(ids)), e=nn.Embedding(31, 16, padding_idx=30), o=nn.Linear(16, 31))
    graph = resect.trace(net, (words(),))
    keep = tuple(range(0, 31, 2))
    resect.cut(net, Plan(groups={"vocabulary": Kept(kind="vocabulary", layer=None, units=31, keep=keep)}), graph)
    table: Any = net.e
    assert table.padding_idx == 15


def test_convolutions_tell_their_channels() -> None:
    net = nn.Sequential(nn.ConvTranspose2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 3, 1))
    graph = resect.trace(net, (torch.zeros(2, 16, 4, 4),))
    resect.cut(net, without_a_third(graph), graph)
    layers: list[Any] = [net[0], net[2], net[3]]
    assert [(layer.in_channels, layer.out_channels) for layer in layers] == [(16, 11), (11, 11), (11, 3)]


class TestNumbersInsideOthers:
    @dataclasses.dataclass(frozen=True)
    class Shape:
        n: int = 4

    @pytest.mark.parametrize(
        "holder",
        [{"n": 4}, (("n", 4),), [("n", 4)], Shape(), types.SimpleNamespace(n=4)],
        ids=["mapping", "pairs", "list of pairs", "record", "namespace"],
    )
    def test_follow_a_cut_and_are_copied(self, holder: Any) -> None:
        net = split_by(Split(holder))
        (heads,) = resect.trace(net, (words(),)).of_kind("heads")
        expected = copy.deepcopy(holder)
        small = cut_heads(net)
        assert number_in(small.get_submodule("split").holder) == 2
        assert holder == expected, "shared with others, and not ours to change"
        assert heads.units == 4

    def test_of_a_partial_function(self) -> None:
        small: Any = cut_heads(split_by(functools.partial(lambda x, n: x.unflatten(-1, (n, -1)).transpose(1, 2), n=4)))
        assert small.split.keywords == {"n": 2}

    @pytest.mark.parametrize("name", ["holder/m", "holder/0", "holder/n/x", "nothing/n", "holder/__class__"])
    def test_a_record_of_another_model_is_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match="record"):
            resize(split_by(Split({"n": 4})), {**EMPTY, "attributes": {"split": {name: 2}}})


EMPTY: dict[str, Any] = {"shapes": {}, "attributes": {}, "silent": {}, "gathered": {}, "removed": []}


class Split(nn.Module):
    """Heads by a number that is held inside something."""

    def __init__(self, holder: Any) -> None:
        super().__init__()
        self.holder = holder

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (number_in(self.holder), -1)).transpose(1, 2)


def number_in(holder: Any) -> int:
    """The number inside any of these holders."""
    number: int = dict(holder)["n"] if isinstance(holder, dict | tuple | list) else holder.n
    return number


def split_by(split: Any) -> nn.Module:
    def forward(self: Any, ids: Tensor) -> Tensor:
        x = self.e(ids)
        q, k, v = map(self.split, self.qkv(x).chunk(3, -1))
        return self.c(x + self.o(((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2)))

    net = Net(forward, e=nn.Embedding(31, 24), qkv=nn.Linear(24, 96), o=nn.Linear(32, 24), c=nn.Linear(24, 5))
    net.split = split
    return net.double()


def cut_heads(net: nn.Module) -> nn.Module:
    """Without the first and the last of four heads; held against the mask."""
    graph = resect.trace(net, (words(),))
    (heads,) = graph.of_kind("heads")
    plan = Plan(groups={heads.name: Kept(kind="heads", layer=heads.layer, units=4, keep=(1, 2))})
    with resect.masked(net, plan, graph):
        expected = net(words())
    small = resect.cut(net, plan, graph)
    torch.testing.assert_close(small(words()), expected)
    return small


@pytest.mark.parametrize("written", ["sum", "mean of squares"])
def test_sums_over_what_is_zero_where_it_is_masked(written: str) -> None:
    if written == "sum":
        net = towers(lambda self, q, k: (q * k).sum(-1))
        inputs, wanted = (rows(), rows(7)), [32]
    else:
        norm: Callable[[Tensor], Tensor] = lambda w: w * torch.rsqrt(w.pow(2).sum(1, keepdim=True) + 1e-8)  # noqa: E731
        parts = {"i": nn.Linear(9, 16), "w": nn.Linear(16, 20, bias=False), "o": nn.Linear(20, 5)}
        net = Net(lambda self, x: self.o(F.linear(self.i(x), norm(self.w.weight))), **parts).double()
        inputs, wanted = (rows(),), [16, 20]  # type: ignore[assignment]
    assert sorted(group.units for group in resect.trace(net, inputs).groups) == wanted
    assert agrees(net, *inputs)


@functools.lru_cache
def lengths(width: int, heads: int) -> tuple[int, int]:
    """What einops works out for axes, and keeps."""
    return heads, width // heads


class Cached(nn.Module):
    """Self-attention that takes the width of a head from a function with a memory."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.number = nn.Linear(24, 48), nn.Linear(16, 24), 4

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, -1)
        q, k, v = (part.reshape(*part.shape[:-1], *lengths(part.shape[-1], self.number)).transpose(1, 2) for part in parts)
        weights = torch.einsum("b h i d, b h j d -> b h i j", q, k).softmax(-1)
        return x + self.out(torch.einsum("bhij,bhjd->bihd", weights, v).flatten(2))


def cached() -> nn.Module:
    return nn.Sequential(nn.Embedding(31, 24), Cached(), Cached(), nn.Linear(24, 5)).eval()


def test_a_function_with_a_memory_couples_no_layers() -> None:
    """The sizes that it gave for the first layer belong to the first layer, and to the first trace."""
    for _ in range(2):
        graph = resect.trace(cached(), (words(),))
        found = [{member.parameter.partition(".")[0] for member in group.members} for group in graph.of_kind("heads")]
        assert sorted(map(sorted, found)) == [["1"], ["2"]]
    assert type(lengths(16, 4)[1]) is int


def test_one_head_is_left_to_an_einsum() -> None:
    """torch leaves axes of one position out of the products that it makes of an einsum."""
    net, ids = cached(), words()
    graph = resect.trace(net, (ids,))
    groups = {one.name: Kept(kind=one.kind, layer=one.layer, units=4, keep=(2,)) for one in graph.of_kind("heads")}
    plan = Plan(groups=groups)
    with resect.masked(net, plan, graph):
        expected = net(ids)
    torch.testing.assert_close(resect.cut(net, plan, graph)(ids), expected)


def test_one_head_is_left_to_a_kernel_of_grouped_queries() -> None:
    """torch repeats keys and values only where queries are more."""

    def forward(self: Any, ids: Tensor) -> Tensor:
        x = self.e(ids)
        q, k, v = (layer(x).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))

    parts = {"q": nn.Linear(24, 32), "k": nn.Linear(24, 8), "v": nn.Linear(24, 8), "o": nn.Linear(32, 5)}
    net = Net(forward, e=nn.Embedding(31, 24), **parts).double()
    graph = resect.trace(net, (words(),))
    (heads,) = graph.of_kind("heads")
    plan = Plan(groups={heads.name: Kept(kind="heads", layer=heads.layer, units=4, keep=(2,))})
    with resect.masked(net, plan, graph):
        expected = net(words())
    torch.testing.assert_close(resect.cut(net, plan, graph)(words()), expected)


def test_views_like_another_tensor_couple() -> None:
    """A gate whose result is brought into the shape of what it gates: both have one width."""

    def forward(self: Any, x: Tensor) -> Tensor:
        stream = self.enter(x)
        inner = self.update(stream)
        return self.leave(self.gate(inner.flatten(0, 1), stream.flatten(0, 1)).reshape_as(inner))

    parts = {"enter": nn.Linear(9, 12), "update": nn.Linear(12, 12), "gate": nn.GRUCell(12, 12), "leave": nn.Linear(12, 5)}
    net = Net(forward, **parts)
    x = torch.randn(2, 7, 9)
    graph = resect.trace(net, (x,))
    assert [group.units for group in graph.groups] == [12]
    assert agrees(net, x)


class Lengths(nn.Module):
    """Keeps numbers twice, and is built again from one of them when it is copied, as layers of einops are."""

    def __init__(self, **lengths: int) -> None:
        super().__init__()
        self.lengths, self.pairs = lengths, tuple(lengths.items())

    def __getstate__(self) -> dict[str, int]:
        return self.lengths

    def __setstate__(self, lengths: dict[str, int]) -> None:
        self.__init__(**lengths)  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (dict(self.pairs)["h"], -1)).transpose(1, 2)


def test_numbers_that_are_kept_twice_follow_together() -> None:
    def forward(self: Any, ids: Tensor) -> Tensor:
        x = self.e(ids)
        q, k, v = (self.split(part) for part in self.qkv(x).chunk(3, -1))
        return self.c(x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))

    parts = {"e": nn.Embedding(31, 24), "qkv": nn.Linear(24, 96), "o": nn.Linear(32, 24), "c": nn.Linear(24, 5)}
    net = Net(forward, split=Lengths(h=4), **parts)
    graph = resect.trace(net, (words(),))
    assert [group.units for group in graph.of_kind("heads")] == [4]
    small = resect.cut(net, without_a_third(graph), graph)
    torch.testing.assert_close(copy.deepcopy(small)(words()), small(words()))


@dataclasses.dataclass
class Config:
    """As litgpt's: a plain object with many fields, not one of transformers."""

    others: dict[str, int]
    n_head: int = 4
    n_groups: int = 2
    size: int = 8


class Grouped(nn.Module):
    """Grouped queries whose two numbers have to change at once, both in a plain object that the blocks share."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.qkv, self.out = nn.Linear(24, 64), nn.Linear(32, 24)

    def forward(self, x: Tensor) -> Tensor:
        one = self.config
        widths = [one.n_head * one.size, one.n_groups * one.size, one.n_groups * one.size]
        q, k, v = (part.unflatten(-1, (-1, one.size)).transpose(1, 2) for part in self.qkv(x).split(widths, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embedding, self.blocks, self.head = nn.Embedding(31, 24), nn.ModuleList(blocks), nn.Linear(24, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_a_plain_configuration_follows_in_every_block_by_itself() -> None:
    config = Config({f"field{number}": 1000 + number for number in range(90)})
    net = Decoder(Grouped(config), Grouped(config)).eval()
    graph = resect.trace(net, (words(),))
    first, second = graph.of_kind("heads")
    plan = Plan(groups={first.name: Kept(kind="heads", layer=first.layer, units=2, keep=(1,))})
    with resect.masked(net, plan, graph):
        expected = net(words())
    torch.testing.assert_close(resect.cut(net, plan, graph)(words()), expected)
    assert (config.n_head, config.n_groups, second.units) == (4, 2, 2)


class Gate(nn.Module):
    """A residual with a gate of its own, so that what a sub-layer puts out has a width of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.new, self.old = nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self.new(x).tanh() * self.old(residual).sigmoid()


def test_lists_of_lists_are_blocks_where_something_inside_hands_on_the_stream() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(31, 24), nn.Linear(24, 5)
            self.layers = nn.ModuleList(nn.ModuleList(self.parts()) for _ in range(3))

        def parts(self) -> list[nn.Module]:
            return [nn.ModuleList([nn.LayerNorm(24)]), nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 24)), Gate()]

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embedding(ids)
            parts: Any
            for parts in self.layers:
                (norm,), mlp, gate = parts
                x = gate(mlp(norm(x)), x)
            return self.head(x)

    graph = resect.trace(Parts().eval(), (words(),))
    assert graph.blocks.count == 3
    assert {group.layer for group in graph.of_kind("channels")} == {0, 1, 2}


def test_a_state_that_a_cache_gives_back_is_the_networks_own() -> None:
    """Recurrent states are left on a module and read with the next token only: no output, so they may be cut."""
    config = transformers.RecurrentGemmaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, lru_width=16
    )
    model = transformers.RecurrentGemmaForCausalLM(config).eval()
    graph = resect.trace(model)
    assert not any(one.reason == "an output of the network" and "rg_lru" in one.parameter for one in graph.frozen)
    assert {member.parameter for group in graph.groups for member in group.members if "recurrent_param" in member.parameter}
