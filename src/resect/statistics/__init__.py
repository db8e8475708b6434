"""Gradients of the token loss, as sums that add; nothing is decided here."""

from resect.statistics.collect import Statistics, collect, position_values, token_loss
from resect.statistics.elements import CRITERIA, Criterion

__all__ = ["CRITERIA", "Criterion", "Statistics", "collect", "position_values", "token_loss"]
