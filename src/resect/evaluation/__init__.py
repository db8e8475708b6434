"""Numbers about a model: how well it predicts, what it answers, how close it stays to another, how fast and large it is."""

from resect.evaluation.agreement import Agreement, Flips, agreement, flips
from resect.evaluation.bootstrap import Interval, paired_interval, paired_ratio
from resect.evaluation.conversation import Conversation, Said
from resect.evaluation.generation import generations
from resect.evaluation.latency import Latency, Spread, check_positions, latencies, latency
from resect.evaluation.mode import evaluating
from resect.evaluation.onward import Onward, first_block
from resect.evaluation.perplexity import Perplexity, perplexity, summed_nats, windows_of
from resect.evaluation.size import PeakMemory, entry_bytes, parameter_count
from resect.evaluation.staircase import DECODED, LatencyTable, Steps, latency_table, measure_families
from resect.evaluation.suite import AnyTask, tasks_named
from resect.evaluation.tasks import SEVEN, Answers, Item, Task, mean_accuracy

__all__ = [
    "DECODED",
    "SEVEN",
    "Agreement",
    "Answers",
    "AnyTask",
    "Flips",
    "Interval",
    "Item",
    "Conversation",
    "Latency",
    "LatencyTable",
    "Onward",
    "PeakMemory",
    "Perplexity",
    "Said",
    "Spread",
    "Steps",
    "Task",
    "agreement",
    "check_positions",
    "entry_bytes",
    "evaluating",
    "first_block",
    "flips",
    "generations",
    "latencies",
    "latency",
    "latency_table",
    "mean_accuracy",
    "measure_families",
    "paired_interval",
    "paired_ratio",
    "parameter_count",
    "perplexity",
    "tasks_named",
    "summed_nats",
    "windows_of",
]
