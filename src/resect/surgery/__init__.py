"""Removing units: the only room, with recovery, that writes to a model."""

from resect.surgery.check import cut_and_check
from resect.surgery.cut import Record, cut, plan_record
from resect.surgery.mask import mask, masked
from resect.surgery.vocabulary import kept_tokens

__all__ = ["Record", "cut", "cut_and_check", "kept_tokens", "mask", "masked", "plan_record"]
