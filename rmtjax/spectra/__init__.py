"""Singular values and vectors of matrices, on any device and at any size.

Kernels come in as `MatrixView`s. Spectra go out as NumPy arrays, singular vectors in the axes of
factors. `_select` alone decides which algorithm computes them; its docstring is the decision table.
"""

from rmtjax.spectra._factors import (
    compose as compose,
    factorize_matrix as factorize_matrix,
    multiply as multiply,
    shrink_values as shrink_values,
    split as split,
    svd as svd,
    truncate_matrix as truncate_matrix,
)
from rmtjax.spectra._lanczos import largest_eigenvalue as largest_eigenvalue
from rmtjax.spectra._outputs import OutputLosses as OutputLosses
from rmtjax.spectra._select import (
    cross_validate as cross_validate,
    decompose as decompose,
    Directions as Directions,
    estimated_spectra as estimated_spectra,
    keeps_most as keeps_most,
    live_sides as live_sides,
    output_factors as output_factors,
    output_losses as output_losses,
    product as product,
    singular_vectors as singular_vectors,
    spectra as spectra,
    truncate_by as truncate_by,
    Values as Values,
    without_last as without_last,
)
from rmtjax.spectra._spectrum import (
    as_matrix as as_matrix,
    blocks_of as blocks_of,
    check_matrix as check_matrix,
    each as each,
    einsum as einsum,
    from_singular_values as from_singular_values,
    lift as lift,
    matmul as matmul,
    pooled_spectrum as pooled_spectrum,
    spectrum as spectrum,
    times_power as times_power,
    to_unit as to_unit,
)
