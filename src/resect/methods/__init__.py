"""A paper each: a straight line of calls into the rooms."""

from resect.methods.llm_pruner import LLMPruner
from resect.methods.prune import METHODS, Result, method_settings, prune

__all__ = ["METHODS", "LLMPruner", "Result", "method_settings", "prune"]
