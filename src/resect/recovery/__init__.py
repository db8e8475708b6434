"""Training what is left: the only room, with surgery, that writes to a model."""

from resect.recovery.adapting import AdapterSettings, adapted, deltas, trained
from resect.recovery.correction import Correction, correct
from resect.recovery.half_space import spent
from resect.recovery.steps import Steps

__all__ = ["AdapterSettings", "Correction", "Steps", "adapted", "correct", "deltas", "spent", "trained"]
