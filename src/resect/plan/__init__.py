"""Which units stay: scores, prices and a budget give a plan."""

from resect.plan.pattern import Matrix, Pattern, lowest, rows_and_columns
from resect.plan.plan import Kept, Plan, keep_all
from resect.plan.select import LAYOUTS, OF, SELECTIONS, Ranges, cost_of, part_of, select, select_share, spent_first

__all__ = [
    "LAYOUTS",
    "OF",
    "SELECTIONS",
    "Kept",
    "Matrix",
    "Pattern",
    "Plan",
    "Ranges",
    "cost_of",
    "keep_all",
    "lowest",
    "part_of",
    "rows_and_columns",
    "select",
    "select_share",
    "spent_first",
]
