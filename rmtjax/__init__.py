"""Random matrix theory for the weights of neural networks, in JAX."""

import sys as _sys

from rmtjax import (
    certificate as certificate,
    checkpoint as checkpoint,
    linen as linen,
    nnx as nnx,
    plots as plots,
)
from rmtjax._axes import Factors as Factors, KernelAxes as KernelAxes
from rmtjax._types import BulkFit as BulkFit, Spectrum as Spectrum
from rmtjax._version import __version__ as __version__
from rmtjax.laws import marchenko_pastur as marchenko_pastur, tracy_widom as tracy_widom
from rmtjax.models import register_layer as register_layer
from rmtjax.noise import fit_bema as fit_bema, ranks as ranks, shrinkage as shrinkage
from rmtjax.planning import (
    Cost as Cost,
    factorize as factorize,
    Factorized as Factorized,
    Kept as Kept,
    merge as merge,
    Plan as Plan,
    plan as plan,
    truncate as truncate,
    Truncated as Truncated,
)
from rmtjax.report import analyze as analyze, Report as Report, Row as Row
from rmtjax.spectra import (
    factorize_matrix as factorize_matrix,
    spectrum as spectrum,
    truncate_matrix as truncate_matrix,
)
from rmtjax.training import (
    metrics as metrics,
    noise_levels as noise_levels,
    penalty as penalty,
    prune_entries as prune_entries,
    prune_spectrum as prune_spectrum,
    PruneEntriesState as PruneEntriesState,
    PruneState as PruneState,
    sparsity as sparsity,
    transfer_opt_state as transfer_opt_state,
)

# So that `help(rmtjax)` tells them.
__all__ = [
    "BulkFit",
    "Cost",
    "Factorized",
    "Factors",
    "Kept",
    "KernelAxes",
    "Plan",
    "PruneEntriesState",
    "PruneState",
    "Report",
    "Row",
    "Spectrum",
    "Truncated",
    "analyze",
    "certificate",
    "checkpoint",
    "factorize",
    "factorize_matrix",
    "fit_bema",
    "linen",
    "marchenko_pastur",
    "merge",
    "metrics",
    "nnx",
    "noise_levels",
    "penalty",
    "plan",
    "plots",
    "prune_entries",
    "prune_spectrum",
    "ranks",
    "register_layer",
    "shrinkage",
    "sparsity",
    "spectrum",
    "tracy_widom",
    "transfer_opt_state",
    "truncate",
    "truncate_matrix",
]

# `import rmtjax.ranks` and `from rmtjax.ranks import bema` find these modules in their rooms.
for _module in (marchenko_pastur, ranks, shrinkage, sparsity, tracy_widom):
    _sys.modules[f"rmtjax.{_module.__name__.rpartition('.')[2]}"] = _module
