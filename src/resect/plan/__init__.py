"""Which units stay: scores, prices and a budget give a plan."""

from resect.plan.budget import BUDGETS, OF, PHASES, Budget, Cost, Workload, bytes_cost, cost_of, macs_cost, macs_of
from resect.plan.pattern import Lines, Matrix, Pattern, lowest, rows_and_columns
from resect.plan.plan import Kept, Plan, keep_all
from resect.plan.select import (
    LAYOUTS,
    SELECTIONS,
    Align,
    Ranges,
    aligned,
    part_of,
    places,
    select,
    select_share,
    select_widths,
    spent_first,
)

__all__ = [
    "BUDGETS",
    "LAYOUTS",
    "OF",
    "PHASES",
    "SELECTIONS",
    "Align",
    "Budget",
    "Cost",
    "Kept",
    "Lines",
    "Matrix",
    "Pattern",
    "Plan",
    "Ranges",
    "Workload",
    "aligned",
    "bytes_cost",
    "cost_of",
    "keep_all",
    "lowest",
    "part_of",
    "places",
    "macs_cost",
    "macs_of",
    "rows_and_columns",
    "select",
    "select_share",
    "select_widths",
    "spent_first",
]
