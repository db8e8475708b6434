"""Removing units: the only room, with recovery, that writes to a model."""

from resect.surgery.check import cut_and_check, gather_and_check, inputs_like, outputs_of, takes, tokens_alone
from resect.surgery.compensate import (
    Loss,
    reading,
    without_columns,
    without_columns_after,
    without_columns_under,
    without_elements,
    without_elements_in_chunks,
    without_rows_and_columns,
)
from resect.surgery.cut import Record, cut, plan_record
from resect.surgery.fade import Fading, Slice
from resect.surgery.gather import check_gatherable, dense_tensors, gather
from resect.surgery.mask import mask, masked
from resect.surgery.tied_sizes import equal_sizes
from resect.surgery.vocabulary import embedding_table, kept_tokens

__all__ = [
    "Fading",
    "Loss",
    "Record",
    "Slice",
    "check_gatherable",
    "cut",
    "cut_and_check",
    "dense_tensors",
    "embedding_table",
    "equal_sizes",
    "gather",
    "gather_and_check",
    "inputs_like",
    "kept_tokens",
    "mask",
    "masked",
    "outputs_of",
    "plan_record",
    "reading",
    "takes",
    "tokens_alone",
    "without_columns",
    "without_columns_after",
    "without_columns_under",
    "without_elements",
    "without_elements_in_chunks",
    "without_rows_and_columns",
]
