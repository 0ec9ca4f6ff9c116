"""From a parameter tree to a plan, and from a plan to a smaller tree.

`find_kernels` sees the leaves of a tree as matrices. `make_plan` measures their spectra and
decides the rank of each kernel, with a reason. With moments of the inputs it also measures what a
cut does to the outputs. `truncate` and `factorize` do what a plan says, and
`merge` multiplies factors out again. Nothing is changed before a plan is applied.
"""

from rmtjax._names import (
    guess_axes as guess_axes,
    in_factor_layer as in_factor_layer,
    is_convolution as is_convolution,
    is_kernel as is_kernel,
    is_untold as is_untold,
    NAMES as NAMES,
    Neighbours as Neighbours,
    register_factor_layers as register_factor_layers,
)
from rmtjax.planning._budget import beyond as beyond, Budget as Budget
from rmtjax.planning._cost import (
    add_costs as add_costs,
    Cost as Cost,
    count_others as count_others,
    NO_OTHERS as NO_OTHERS,
    Others as Others,
    rows_by_path as rows_by_path,
    time_products as time_products,
)
from rmtjax.planning._kernels import (
    check_chosen as check_chosen,
    check_concrete as check_concrete,
    check_matches as check_matches,
    check_patterns as check_patterns,
    find_kernels as find_kernels,
    is_abstract as is_abstract,
    leaves_by_path as leaves_by_path,
    map_kernels as map_kernels,
    nothing_chosen as nothing_chosen,
    obstacle as obstacle,
    path_name as path_name,
    register_container as register_container,
    to_predicate as to_predicate,
    unchosen as unchosen,
    warn_if_idle as warn_if_idle,
)
from rmtjax.planning._measure import (
    Findings as Findings,
    merge_findings as merge_findings,
    study as study,
)
from rmtjax.planning._options import (
    check_count as check_count,
    check_share as check_share,
    PlanOptions as PlanOptions,
    to_number as to_number,
)
from rmtjax.planning._outputs import along as along, refit as refit
from rmtjax.planning._plan import (
    decide_all as decide_all,
    judge_again as judge_again,
    make_plan as make_plan,
    plan as plan,
    trade_off as trade_off,
    TradeOff as TradeOff,
    without_values as without_values,
)
from rmtjax.planning._rows import (
    check_plan as check_plan,
    check_plan_fits as check_plan_fits,
    Factorized as Factorized,
    Hold as Hold,
    in_place as in_place,
    Kept as Kept,
    LayerPlan as LayerPlan,
    Plan as Plan,
    Truncated as Truncated,
    UNNAMED as UNNAMED,
)
from rmtjax.planning._truncate import (
    changed_leaves as changed_leaves,
    factorize as factorize,
    merge as merge,
    truncate as truncate,
)
