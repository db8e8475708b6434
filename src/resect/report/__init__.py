"""Results as values with a versioned JSON form, as tables for a terminal, and as Markdown."""

from resect.report.figures import mean_of
from resect.report.inspection import Inspection, inspection
from resect.report.knowledge import GroupKnowledge, Knowledge, Removal, knowledge_markdown, knowledge_table
from resect.report.knowledge_picture import knowledge_html, knowledge_png
from resect.report.machine import machine, peak_memory, versions
from resect.report.markdown import run_markdown
from resect.report.picture import inspection_dot, inspection_tree
from resect.report.recovery import RecoveryReport, recovery_markdown, recovery_report, recovery_tables
from resect.report.results import (
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
from resect.report.tables import comparison_table, inspection_tables, run_tables

__all__ = [
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
    "comparison_table",
    "inspection",
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
    "recovery_markdown",
    "recovery_report",
    "recovery_tables",
    "run_markdown",
    "run_report",
    "run_tables",
    "versions",
]
