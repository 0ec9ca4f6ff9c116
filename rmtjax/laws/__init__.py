"""Laws of the eigenvalues of pure noise.

Two public modules are the Marchenko-Pastur law of the bulk and the Tracy-Widom law of the largest
eigenvalue. The other functions apply them to matrices of finite size. Numbers and arrays come in,
arrays go out. No function of this room knows about parameter trees.
"""

from rmtjax.laws import marchenko_pastur as marchenko_pastur, tracy_widom as tracy_widom
from rmtjax.laws._finite_size import (
    bulk_law as bulk_law,
    check_level as check_level,
    check_significance as check_significance,
    critical_distance as critical_distance,
    noise_threshold as noise_threshold,
)
