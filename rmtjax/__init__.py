"""Random matrix theory for the weights of neural networks, in JAX."""

import sys as _sys
import types as _python_types

import rmtjax._help as _help
from rmtjax import adapters, certificate, checkpoint, linen, lowrank, moments, nnx, plots
from rmtjax._axes import Factors, KernelAxes
from rmtjax._types import BulkFit, Spectrum
from rmtjax._version import __version__ as __version__
from rmtjax.laws import marchenko_pastur, tracy_widom
from rmtjax.models import register_layer
from rmtjax.monitoring import History, KernelLook, monitor, MonitorState
from rmtjax.noise import (
    equalize,
    Equalized,
    fit_bema,
    metrics_of,
    ranks,
    shrinkage,
    SpectralMetrics,
)
from rmtjax.planning import (
    Budget,
    Cost,
    factorize,
    Factorized,
    Kept,
    merge,
    Plan,
    plan,
    refit,
    trade_off,
    TradeOff,
    truncate,
    Truncated,
)
from rmtjax.replicas import (
    agree,
    AgreeState,
    average_params,
    averaged,
    AverageState,
    deal,
    merge_replicas,
    Merged,
    replicate,
)
from rmtjax.report import (
    analyze,
    compare_reports,
    Entry,
    ExtraMetrics,
    find_traps,
    mask,
    most_signal,
    Report,
    Row,
    SpectralChange,
    Spike,
    Traps,
)
from rmtjax.sparse import (
    admm,
    AdmmState,
    drop_and_grow,
    DropAndGrowState,
    patterns,
    projections,
    prune_entries,
    PruneEntriesState,
    SparseState,
    sparsity,
)
from rmtjax.spectra import factorize_matrix, pooled_spectrum, spectrum, truncate_matrix
from rmtjax.training import (
    metrics,
    noise_levels,
    penalty,
    prune_spectrum,
    PruneState,
    transfer_opt_state,
)

# So that `help(rmtjax)` tells them.
__all__ = [
    "AdmmState",
    "AgreeState",
    "AverageState",
    "Budget",
    "BulkFit",
    "Cost",
    "DropAndGrowState",
    "Entry",
    "Equalized",
    "ExtraMetrics",
    "Factorized",
    "Factors",
    "History",
    "Kept",
    "KernelAxes",
    "KernelLook",
    "Merged",
    "MonitorState",
    "Plan",
    "PruneEntriesState",
    "PruneState",
    "Report",
    "Row",
    "SparseState",
    "SpectralChange",
    "SpectralMetrics",
    "Spectrum",
    "Spike",
    "TradeOff",
    "Traps",
    "Truncated",
    "adapters",
    "admm",
    "agree",
    "analyze",
    "average_params",
    "averaged",
    "certificate",
    "checkpoint",
    "compare_reports",
    "deal",
    "drop_and_grow",
    "equalize",
    "factorize",
    "factorize_matrix",
    "find_traps",
    "fit_bema",
    "linen",
    "lowrank",
    "marchenko_pastur",
    "mask",
    "merge",
    "merge_replicas",
    "metrics",
    "metrics_of",
    "moments",
    "monitor",
    "most_signal",
    "nnx",
    "noise_levels",
    "patterns",
    "penalty",
    "plan",
    "plots",
    "pooled_spectrum",
    "projections",
    "prune_entries",
    "prune_spectrum",
    "ranks",
    "refit",
    "register_layer",
    "replicate",
    "shrinkage",
    "sparsity",
    "spectrum",
    "tracy_widom",
    "trade_off",
    "transfer_opt_state",
    "truncate",
    "truncate_matrix",
]

# `import rmtjax.ranks` and `from rmtjax.ranks import bema` find these modules in their rooms.
for _module in (
    marchenko_pastur,
    patterns,
    projections,
    ranks,
    shrinkage,
    sparsity,
    tracy_widom,
):
    _sys.modules[f"rmtjax.{_module.__name__.rpartition('.')[2]}"] = _module

# So that `dir` and `help` show what is public, in short words.
for _name in __all__:
    if isinstance(_module := globals()[_name], _python_types.ModuleType):
        _help.tidy(_module)
_help.tidy(_sys.modules[__name__])
