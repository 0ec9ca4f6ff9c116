"""Estimates the noise in a spectrum, and from it the rank.

The input is a `Spectrum`. `fit_bema` returns its noise level, rank rules count its signal
directions, and shrinkage corrects the singular values that remain. `metrics_of` returns the other
numbers that people read off a spectrum. `equalize` divides a matrix by the scales that its noise
has in rows and columns.
"""

from rmtjax.noise import ranks as ranks, shrinkage as shrinkage
from rmtjax.noise._bema import (
    above_rounding as above_rounding,
    count_above as count_above,
    fit_bema as fit_bema,
)
from rmtjax.noise._equalize import (
    advises as advises,
    equalize as equalize,
    equalize_stack as equalize_stack,
    Equalized as Equalized,
    equalized_view as equalized_view,
    equalizes as equalizes,
    level_after as level_after,
    Sides as Sides,
)
from rmtjax.noise._pieces import (
    fit_live as fit_live,
    level_of as level_of,
    live_spectra as live_spectra,
    on_scale as on_scale,
    Piece as Piece,
    rescale as rescale,
    split_pieces as split_pieces,
)
from rmtjax.noise._rule_numbers import (
    join_rule as join_rule,
    kept_rank as kept_rank,
    pad_for as pad_for,
    split_rule as split_rule,
)
from rmtjax.noise._spectral_metrics import (
    metrics_of as metrics_of,
    metrics_of_each as metrics_of_each,
    some_metrics as some_metrics,
    SpectralMetrics as SpectralMetrics,
)
from rmtjax.noise.ranks import check_rule as check_rule
from rmtjax.noise.shrinkage import Shrink as Shrink
