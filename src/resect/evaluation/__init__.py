"""Numbers about a model: how well it predicts, what it answers, how close it stays to another, how fast and large it is."""

from resect.evaluation.agreement import Agreement, Flips, agreement, flips
from resect.evaluation.bootstrap import Interval, paired_interval
from resect.evaluation.conversation import Conversation, Said
from resect.evaluation.generation import generations
from resect.evaluation.latency import Latency, Spread, latencies, latency
from resect.evaluation.mode import evaluating
from resect.evaluation.onward import Onward
from resect.evaluation.perplexity import Perplexity, exponential, perplexity, summed_nats, windows_of
from resect.evaluation.size import parameter_count
from resect.evaluation.suite import AnyTask, tasks_named
from resect.evaluation.tasks import SEVEN, Answers, Item, Task, mean_accuracy

__all__ = [
    "SEVEN",
    "Agreement",
    "Answers",
    "AnyTask",
    "Flips",
    "Interval",
    "Item",
    "Conversation",
    "Latency",
    "Onward",
    "Perplexity",
    "Said",
    "Spread",
    "Task",
    "agreement",
    "evaluating",
    "flips",
    "exponential",
    "generations",
    "latencies",
    "latency",
    "mean_accuracy",
    "paired_interval",
    "parameter_count",
    "perplexity",
    "tasks_named",
    "summed_nats",
    "windows_of",
]
