"""Matrix in, singular values and vectors out."""

from rmtjax.spectra._directions import first_directions as first_directions
from rmtjax.spectra._factors import (
    compose as compose,
    factorize_matrix as factorize_matrix,
    multiply as multiply,
    project as project,
    shrink_values as shrink_values,
    split as split,
    svd as svd,
    truncate_matrix as truncate_matrix,
)
from rmtjax.spectra._gram import directions as directions
from rmtjax.spectra._host_directions import (
    host_directions as host_directions,
    host_without_last as host_without_last,
    Read as Read,
)
from rmtjax.spectra._host_spectra import host_spectra as host_spectra
from rmtjax.spectra._lanczos import estimate as estimate, pays as estimate_pays
from rmtjax.spectra._select import (
    Directions as Directions,
    estimated_spectra as estimated_spectra,
    keeps_most as keeps_most,
    product as product,
    singular_vectors as singular_vectors,
    spectra as spectra,
    Values as Values,
    without_last as without_last,
)
from rmtjax.spectra._sharded import is_spread as is_spread, sharded_spectra as sharded_spectra
from rmtjax.spectra._sharded_directions import (
    sharded_directions as sharded_directions,
    sharded_product as sharded_product,
    short_vectors as short_vectors,
)
from rmtjax.spectra._spectrum import (
    check_matrix as check_matrix,
    each as each,
    from_singular_values as from_singular_values,
    lift as lift,
    spectrum as spectrum,
)
from rmtjax.spectra._subspace_iteration import (
    Leading as Leading,
    leading_above as leading_above,
    pays as iteration_pays,
)
from rmtjax.spectra._values import on_host as on_host
