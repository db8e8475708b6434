"""A paper each: a straight line of calls into the rooms."""

from resect.methods.budget import check_budget, check_sizes_once, read_table
from resect.methods.compensation import Compensation
from resect.methods.knowledge import analyze
from resect.methods.llm_pruner import LLMPruner
from resect.methods.llm_surgeon import LLMSurgeon
from resect.methods.lorashear import LoRAShear
from resect.methods.method import Method
from resect.methods.prune import METHODS, Result, method_settings, prune
from resect.methods.trials import Trials
from resect.methods.vocabulary import Vocabulary, vocabulary_plan
from resect.report import Knowledge

__all__ = [
    "METHODS",
    "Compensation",
    "Knowledge",
    "LLMPruner",
    "LLMSurgeon",
    "LoRAShear",
    "Method",
    "Result",
    "Trials",
    "Vocabulary",
    "analyze",
    "check_budget",
    "check_sizes_once",
    "method_settings",
    "prune",
    "read_table",
    "vocabulary_plan",
]
