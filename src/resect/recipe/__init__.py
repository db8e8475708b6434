"""Recipes: everything that a run needs in one file, and carrying it out."""

from resect.recipe.analysis import analysis
from resect.recipe.bench import bench
from resect.recipe.comparing import compare
from resect.recipe.measure import conversations, evaluate
from resect.recipe.reading import evaluation_section, read_recipe
from resect.recipe.recovery import RecoveryRecipe, RecoveryResult, read_recovery_recipe, run_recovery
from resect.recipe.runs import RunResult, run
from resect.recipe.schema import CalibrationSection, EvaluationSection, Recipe, Timing, VocabularySection

__all__ = [
    "CalibrationSection",
    "EvaluationSection",
    "Recipe",
    "RecoveryRecipe",
    "RecoveryResult",
    "RunResult",
    "Timing",
    "VocabularySection",
    "analysis",
    "compare",
    "bench",
    "conversations",
    "evaluate",
    "evaluation_section",
    "read_recipe",
    "read_recovery_recipe",
    "run",
    "run_recovery",
]
