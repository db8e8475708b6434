"""Results as values with a versioned JSON form, as tables for a terminal, and as Markdown."""

from resect.report.bench import Benched, BenchReport, BenchRow, bench_markdown, bench_table
from resect.report.compare import Comparison, comparison, comparison_tables
from resect.report.exports import export_table
from resect.report.figures import mean_of
from resect.report.inspection import Inspection, inspection
from resect.report.knowledge import GroupKnowledge, Knowledge, Removal, knowledge_markdown, knowledge_table
from resect.report.knowledge_picture import knowledge_png
from resect.report.machine import machine, peak_memory, versions
from resect.report.markdown import run_markdown
from resect.report.page import comparison_html, is_page, knowledge_html, recovery_html, run_html
from resect.report.picture import inspection_dot, inspection_tree, is_picture
from resect.report.recovery import RecoveryReport, recovery_card, recovery_markdown, recovery_report, recovery_tables
from resect.report.results import (
    BudgetMet,
    Curve,
    CurvePoint,
    Difference,
    EvaluationReport,
    Measured,
    Respelled,
    RunReport,
    TaskAccuracy,
    TaskFlips,
    TextAgreement,
    TextPerplexity,
    Timings,
    run_report,
)
from resect.report.scores import saliency
from resect.report.tables import comparison_table, inspection_tables, run_tables

__all__ = [
    "Comparison",
    "Curve",
    "CurvePoint",
    "BenchReport",
    "BenchRow",
    "Benched",
    "BudgetMet",
    "Difference",
    "EvaluationReport",
    "GroupKnowledge",
    "Inspection",
    "Knowledge",
    "Measured",
    "RecoveryReport",
    "Removal",
    "Respelled",
    "RunReport",
    "TaskAccuracy",
    "TaskFlips",
    "TextAgreement",
    "TextPerplexity",
    "Timings",
    "comparison",
    "comparison_html",
    "bench_markdown",
    "bench_table",
    "comparison_table",
    "comparison_tables",
    "export_table",
    "inspection",
    "is_page",
    "is_picture",
    "inspection_dot",
    "inspection_tables",
    "inspection_tree",
    "knowledge_html",
    "knowledge_markdown",
    "knowledge_png",
    "knowledge_table",
    "machine",
    "mean_of",
    "peak_memory",
    "recovery_card",
    "recovery_html",
    "recovery_markdown",
    "recovery_report",
    "recovery_tables",
    "run_markdown",
    "run_html",
    "run_report",
    "run_tables",
    "saliency",
    "versions",
]
