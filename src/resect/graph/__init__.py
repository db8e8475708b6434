"""Which slices of which parameters belong together: found by tracing on fake tensors, no weights needed."""

from resect.graph.atoms import Axis, Contest, freeze, join
from resect.graph.blocks import Blocks
from resect.graph.groups import KINDS, Factor, Frozen, Graph, Group, Member, Rivals, Term
from resect.graph.rules import Call, op_rule
from resect.graph.trace import Watcher, replay, trace

__all__ = [
    "KINDS",
    "Axis",
    "Blocks",
    "Call",
    "Contest",
    "Factor",
    "Frozen",
    "Graph",
    "Group",
    "Member",
    "Rivals",
    "Term",
    "Watcher",
    "freeze",
    "join",
    "op_rule",
    "replay",
    "trace",
]
