"""What removing a unit is estimated to cost: one formula of one paper each."""

from resect.saliency.score import REDUCTIONS, score, unit_values

__all__ = ["REDUCTIONS", "score", "unit_values"]
