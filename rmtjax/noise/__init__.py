"""Spectrum in, noise level and rank out."""

from rmtjax.noise import ranks as ranks, shrinkage as shrinkage
from rmtjax.noise._bema import (
    above_rounding as above_rounding,
    count_above as count_above,
    fit_bema as fit_bema,
)
from rmtjax.noise._density import (
    Histogram as Histogram,
    histogram as histogram,
    law_curve as law_curve,
    law_left as law_left,
    roots as roots,
    rounding as rounding,
)
from rmtjax.noise.ranks import check_rule as check_rule, kept_rank as kept_rank
from rmtjax.noise.shrinkage import Shrink as Shrink
