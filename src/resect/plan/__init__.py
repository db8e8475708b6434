"""Which units stay: scores, prices and a budget give a plan."""

from resect.plan.plan import Kept, Plan, keep_all
from resect.plan.select import LAYOUTS, OF, SELECTIONS, Ranges, cost_of, select, select_share

__all__ = [
    "LAYOUTS",
    "OF",
    "SELECTIONS",
    "Kept",
    "Plan",
    "Ranges",
    "cost_of",
    "keep_all",
    "select",
    "select_share",
]
