"""Gradients of the loss and Kronecker factors of its curvature, as sums that add; nothing is decided here."""

from resect.statistics.collect import Statistics, collect, position_values, token_loss
from resect.statistics.curvature import FISHERS, Curvature, DampingRaised, Moments, collect_curvature
from resect.statistics.elements import CRITERIA, Criterion
from resect.statistics.layers import Layer, layer_of, layers_of, read_by
from resect.statistics.objective import Classes, NextToken, Objective

__all__ = [
    "CRITERIA",
    "FISHERS",
    "Classes",
    "Criterion",
    "Curvature",
    "DampingRaised",
    "Layer",
    "Moments",
    "NextToken",
    "Objective",
    "Statistics",
    "collect",
    "collect_curvature",
    "layer_of",
    "layers_of",
    "position_values",
    "read_by",
    "token_loss",
]
