"""A paper each: a straight line of calls into the rooms."""

from resect.methods.llm_pruner import LLMPruner
from resect.methods.prune import METHODS, Result, method_settings, prune
from resect.methods.vocabulary import Vocabulary, vocabulary_plan

__all__ = ["METHODS", "LLMPruner", "Result", "Vocabulary", "method_settings", "prune", "vocabulary_plan"]
