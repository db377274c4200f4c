"""Results of evaluation: one Parquet file for each attempt at a cell, read together, shown as the paper's tables.

    store = ResultStore("s3://bucket/results")
    store.write(cell, Outcome(status="ok", metrics={"accuracy": 0.61}))
    print(to_text(paper_tables(store.read(), over="distillation")))

Knows nothing of how numbers come about: no torch, no Ray.
"""

from krrst_dist.results.commands import report_main, results_main, select
from krrst_dist.results.render import to_csv, to_latex, to_markdown, to_text
from krrst_dist.results.schema import SCHEMA, Cell, Outcome, ResultsError
from krrst_dist.results.store import ResultStore
from krrst_dist.results.tables import Entry, PaperTable, paper_tables

__all__ = ["SCHEMA", "Cell", "Entry", "Outcome", "PaperTable", "ResultStore", "ResultsError", "paper_tables", "report_main",
           "results_main", "select", "to_csv", "to_latex", "to_markdown", "to_text"]
