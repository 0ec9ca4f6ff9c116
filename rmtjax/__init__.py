"""Random matrix theory for the weights of neural networks, in JAX."""

from rmtjax import (
    certificate as certificate,
    checkpoint as checkpoint,
    linen as linen,
    marchenko_pastur as marchenko_pastur,
    nnx as nnx,
    plots as plots,
    ranks as ranks,
    shrinkage as shrinkage,
    sparsity as sparsity,
    tracy_widom as tracy_widom,
)
from rmtjax._bulk import fit_bema as fit_bema
from rmtjax._cost import Cost as Cost
from rmtjax._entries import prune_entries as prune_entries, PruneEntriesState as PruneEntriesState
from rmtjax._factors import (
    factorize_matrix as factorize_matrix,
    Factors as Factors,
    truncate_matrix as truncate_matrix,
)
from rmtjax._layers import register_layer as register_layer
from rmtjax._metrics import metrics as metrics
from rmtjax._opt_state import transfer as transfer
from rmtjax._penalty import penalty as penalty
from rmtjax._plan import (
    LayerPlan as LayerPlan,
    Plan as Plan,
    plan as plan,
)
from rmtjax._spectrum import spectrum as spectrum
from rmtjax._transform import prune_spectrum as prune_spectrum, PruneState as PruneState
from rmtjax._truncate import (
    factorize as factorize,
    merge as merge,
    truncate as truncate,
)
from rmtjax._typing import (
    BulkFit as BulkFit,
    KernelAxes as KernelAxes,
    Spectrum as Spectrum,
)
from rmtjax._version import __version__ as __version__
from rmtjax.report import analyze as analyze, Report as Report, Row as Row

# So that `help(rmtjax)` tells them.
__all__ = [
    "BulkFit",
    "Cost",
    "Factors",
    "KernelAxes",
    "LayerPlan",
    "Plan",
    "PruneEntriesState",
    "PruneState",
    "Report",
    "Row",
    "Spectrum",
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
    "transfer",
    "truncate",
    "truncate_matrix",
]
