"""Tree in, plan out, and what a plan does."""

from rmtjax.planning._apply import (
    factorize as factorize,
    in_place as in_place,
    merge as merge,
    truncate as truncate,
)
from rmtjax.planning._cost import add_costs as add_costs, Cost as Cost, timing_once as timing_once
from rmtjax.planning._cut import change_leaf as change_leaf
from rmtjax.planning._kernels import (
    check_tree as check_tree,
    FACTORS as FACTORS,
    find_kernels as find_kernels,
    guess_axes as guess_axes,
    is_kernel as is_kernel,
    map_kernels as map_kernels,
    NAMES as NAMES,
    path_name as path_name,
    unmatrixable as unmatrixable,
)
from rmtjax.planning._plan import (
    Action as Action,
    check_plan as check_plan,
    LayerPlan as LayerPlan,
    Plan as Plan,
    plan as plan,
)
