"""Numbers about a model: how well it predicts, how fast it is, what it writes, how large it is."""

from resect.evaluation.generation import generations
from resect.evaluation.latency import Latency, Spread, latencies, latency
from resect.evaluation.mode import evaluating
from resect.evaluation.perplexity import Perplexity, perplexity
from resect.evaluation.size import parameter_count

__all__ = [
    "Latency",
    "Perplexity",
    "Spread",
    "evaluating",
    "generations",
    "latencies",
    "latency",
    "parameter_count",
    "perplexity",
]
