"""Plan in, tables and pages out."""

from rmtjax.report._report import analyze as analyze, Report as Report
from rmtjax.report._row import Row as Row
