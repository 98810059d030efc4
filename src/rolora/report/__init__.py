"""Finished or unfinished runs as rows of a table, as pictures, and as one HTML page.

>>> from rolora.report import load_run, summarise, write_report
>>> for row in summarise([load_run("runs/a"), load_run("runs/b")]):   # doctest: +SKIP
...     print(row.method, row.final_mean, row.megabytes_up)
>>> write_report([Path("runs/a"), Path("runs/b")], Path("report.html"))   # doctest: +SKIP
"""

from rolora.report.figures import save_split_picture
from rolora.report.page import write_report
from rolora.report.reading import verdicts
from rolora.report.summary import Row, Run, load_run, primary_metric, summarise

__all__ = [
    "Row",
    "Run",
    "load_run",
    "primary_metric",
    "save_split_picture",
    "summarise",
    "verdicts",
    "write_report",
]
