"""Reports on parameter trees, and on the plans that are made for them.

`analyze` makes a `Report` of a tree. A report shows a plan as rows, text, JSON, CSV, Markdown,
HTML, a data frame or a page that opens in a browser.
"""

from rmtjax.report._analyze import analyze as analyze
from rmtjax.report._columns import expand_columns as expand_columns
from rmtjax.report._compare import compare_reports as compare_reports
from rmtjax.report._extra import (
    Extra as Extra,
    ExtraMetrics as ExtraMetrics,
    SpectralChange as SpectralChange,
)
from rmtjax.report._most_signal import mask as mask, most_signal as most_signal
from rmtjax.report._report import Report as Report
from rmtjax.report._row import Row as Row
from rmtjax.report._traps import (
    Entry as Entry,
    find_traps as find_traps,
    Spike as Spike,
    Traps as Traps,
)
