"""Which slices of which parameters belong together: found by tracing on fake tensors, no weights needed."""

from resect.graph.atoms import Atom, Axis, Contest, freeze, join, kept_length, length
from resect.graph.blocks import Blocks
from resect.graph.depth import Silence, Sublayer
from resect.graph.groups import DEPTH, KINDS, Factor, Frame, Frozen, Graph, Group, Member, Rivals, Term
from resect.graph.rules import Call, op_rule
from resect.graph.trace import Replay, Unwritten, Watcher, reachable, retrace, trace
from resect.graph.vocabulary import TOKEN_FIELD, VOCABULARY

__all__ = [
    "DEPTH",
    "KINDS",
    "TOKEN_FIELD",
    "VOCABULARY",
    "Atom",
    "Axis",
    "Blocks",
    "Call",
    "Contest",
    "Factor",
    "Frame",
    "Frozen",
    "Graph",
    "Group",
    "Member",
    "Replay",
    "Rivals",
    "Silence",
    "Sublayer",
    "Term",
    "Unwritten",
    "Watcher",
    "freeze",
    "join",
    "kept_length",
    "length",
    "op_rule",
    "reachable",
    "retrace",
    "trace",
]
