"""The laws of pure noise."""

from rmtjax.laws import marchenko_pastur as marchenko_pastur, tracy_widom as tracy_widom
from rmtjax.laws._finite_size import (
    bulk_law as bulk_law,
    check_level as check_level,
    check_significance as check_significance,
    critical_distance as critical_distance,
    noise_threshold as noise_threshold,
)
