"""Models as files: loading any of them, and saving cut ones so that others can load them."""

from resect.checkpoint.load import DEMO, check_finite, load, load_tokenizer, skeleton
from resect.checkpoint.plain import load_into
from resect.checkpoint.precision import round_to_storage
from resect.checkpoint.record import compose, record_of
from resect.checkpoint.save import save
from resect.checkpoint.saved import Saved
from resect.checkpoint.stock import Stock, expressible_kinds, expressible_sizes, find_stock, inexpressible
from resect.checkpoint.tokenizer import cut_tokenizer, needed_tokens
from resect.checkpoint.verify import verify
from resect.files import check_directory, whole_directory
from resect.files.progress import Progress
from resect.surgery.modeling_resect import resize

__all__ = [
    "DEMO",
    "Progress",
    "Saved",
    "Stock",
    "check_directory",
    "check_finite",
    "compose",
    "cut_tokenizer",
    "expressible_kinds",
    "expressible_sizes",
    "find_stock",
    "inexpressible",
    "load",
    "load_into",
    "load_tokenizer",
    "needed_tokens",
    "record_of",
    "resize",
    "round_to_storage",
    "save",
    "skeleton",
    "verify",
    "whole_directory",
]
