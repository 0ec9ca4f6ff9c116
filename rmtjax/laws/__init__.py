"""Laws of the eigenvalues of pure noise.

Two public modules are the Marchenko-Pastur law of the bulk and the Tracy-Widom law of the largest
eigenvalue. The other functions apply them to matrices of finite size, and draw them. Numbers and
arrays come in, arrays go out. No function of this room knows about parameter trees.
"""

from rmtjax.laws import marchenko_pastur as marchenko_pastur, tracy_widom as tracy_widom
from rmtjax.laws._finite_size import (
    bulk_law as bulk_law,
    check_level as check_level,
    check_significance as check_significance,
    critical_distance as critical_distance,
    law_curve as law_curve,
    law_left as law_left,
    level_quantile as level_quantile,
    noise_above as noise_above,
    noise_threshold as noise_threshold,
    roots as roots,
    rounding as rounding,
    shuffled_threshold as shuffled_threshold,
    threshold_at as threshold_at,
)
