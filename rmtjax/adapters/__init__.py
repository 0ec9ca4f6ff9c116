"""Finds what a fine-tuning has changed, kernel by kernel, and writes it as a low-rank adapter.

Two checkpoints of one model come in. A report on the spectra of the difference goes out, or an
adapter that other programs load. One kernel is in memory at a time.
"""

from rmtjax.adapters._difference import (
    analyze_difference as analyze_difference,
    Difference as Difference,
)
from rmtjax.adapters._lora import extract_lora as extract_lora

__all__ = ["Difference", "analyze_difference", "extract_lora"]
