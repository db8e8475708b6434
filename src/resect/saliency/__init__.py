"""What removing a unit is estimated to cost: one formula of one paper each."""

from resect.saliency.adapted import adapted_scores
from resect.saliency.ladders import Ladder, Reader, ladder, line_ladders, reach
from resect.saliency.obs import block_losses, column_losses, element_losses, independent_losses, pattern_losses, row_losses
from resect.saliency.score import REDUCTIONS, score, unit_values

__all__ = [
    "REDUCTIONS",
    "Ladder",
    "Reader",
    "adapted_scores",
    "block_losses",
    "column_losses",
    "element_losses",
    "independent_losses",
    "ladder",
    "line_ladders",
    "pattern_losses",
    "reach",
    "row_losses",
    "score",
    "unit_values",
]
