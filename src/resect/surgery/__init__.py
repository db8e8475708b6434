"""Removing units: the only room, with recovery, that writes to a model."""

from resect.surgery.cut import Record, check_cut, cut, plan_record
from resect.surgery.mask import mask, masked

__all__ = ["Record", "check_cut", "cut", "mask", "masked", "plan_record"]
