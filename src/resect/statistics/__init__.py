"""Gradients of the loss and Kronecker factors of its curvature, as sums that add; nothing is decided here."""

from resect.statistics.blockwise import Chain, prepared
from resect.statistics.cholesky import inverse_of, root_of, solved_by
from resect.statistics.collect import BATCH_TOKENS, Statistics, collect, position_values, token_loss
from resect.statistics.curvature import FISHERS, WITHOUT_GRADIENTS, Curvature, Moments, collect_curvature, tell_clipped
from resect.statistics.elements import CRITERIA, Criterion
from resect.statistics.experts import Activation, expert_activations
from resect.statistics.joint import Joint
from resect.statistics.layers import Layer, layer_of, layers_of, readers, wide
from resect.statistics.losses import IGNORED, MOST_NATS, divergence, perplexity_of, prediction_losses, token_losses
from resect.statistics.objective import Classes, Data, NextToken, Objective, loss_of
from resect.statistics.precision import computing, tell_emulated
from resect.statistics.prefix import Pairs, Prefix

__all__ = [
    "BATCH_TOKENS",
    "CRITERIA",
    "FISHERS",
    "IGNORED",
    "MOST_NATS",
    "WITHOUT_GRADIENTS",
    "Activation",
    "Chain",
    "Classes",
    "Criterion",
    "Curvature",
    "Data",
    "Joint",
    "Layer",
    "Moments",
    "NextToken",
    "Objective",
    "Pairs",
    "Prefix",
    "Statistics",
    "collect",
    "collect_curvature",
    "computing",
    "divergence",
    "expert_activations",
    "inverse_of",
    "layer_of",
    "layers_of",
    "loss_of",
    "perplexity_of",
    "position_values",
    "prediction_losses",
    "prepared",
    "readers",
    "root_of",
    "solved_by",
    "tell_clipped",
    "tell_emulated",
    "token_loss",
    "token_losses",
    "wide",
]
