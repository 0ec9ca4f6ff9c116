"""The ways to cut the network for a size, and what is left of its logits."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, PyTree

import rmtjax
from experiments.efficientnet.model import EfficientNetLite0, fold
from rmtjax.moments import Moments

SHARES = (0.9, 0.75, 0.5)  # of the parameters of the kernels that are cut
BATCH = 8  # crops
Crops = Float[np.ndarray, "n side side 3"]
Logits = Float[np.ndarray, "n classes"]


def plain(moments: Moments, **options: Any) -> Moments:
    """Returns moments without gradients, with some options."""
    found = Moments(moments.groups, {}, moments.names, axes=moments.axes)
    return found.with_options(**options)


# Whether normalizations are folded into the kernels, and what becomes of the moments. Only a
# kernel with a bias, as after folding, can be cut by centred moments.
METHODS: dict[str, tuple[bool, Callable[[Moments], Moments | None]]] = {
    "weights": (False, lambda moments: None),
    "weights, folded": (True, lambda moments: None),
    "outputs": (False, plain),
    "outputs, folded": (True, plain),
    "outputs, folded, centred": (True, partial(plain, centred=True)),
    "outputs, folded, gradients": (True, lambda moments: moments),
    "outputs, folded, centred, gradients": (
        True,
        lambda moments: moments.with_options(centred=True),
    ),
}


def is_pointwise(path: str, leaf: Any) -> bool:
    """Returns True for the kernels of 1 x 1 convolutions.

    A depthwise kernel is left alone. Each of its channels has a matrix of rank 1.
    """
    return path.endswith("kernel") and leaf.shape[:-2] == (1, 1)


def batches(crops: Crops) -> list[Crops]:
    """Returns crops in batches of `BATCH`, the last of which may be smaller."""
    return np.split(crops, range(BATCH, len(crops), BATCH))


@partial(jax.jit, static_argnums=0)
def _logits(module: EfficientNetLite0, variables: PyTree, crops: jax.Array) -> Any:
    return module.apply(variables, crops)


def logits(variables: Mapping[str, PyTree], crops: Crops) -> Logits:
    """Returns the logits of the network, folded or not, on crops."""
    module = EfficientNetLite0(folded="batch_stats" not in variables)
    return np.concatenate([_logits(module, variables, part) for part in batches(crops)])


def compare(dense: Logits, cut: Logits) -> dict[str, float]:
    """Returns the share of crops of the same class, and the mean cosine between logits."""
    lengths = np.linalg.norm(dense, axis=1) * np.linalg.norm(cut, axis=1)
    cosines = np.sum(dense * cut, axis=1) / lengths
    same = np.argmax(dense, axis=1) == np.argmax(cut, axis=1)
    return {"same": float(np.mean(same)), "cosine": float(np.mean(cosines))}


def cut(
    variables: Mapping[str, PyTree], axes: Mapping[str, Any], moments: Moments | None
) -> Iterator[tuple[float, float, dict[str, PyTree]]]:
    """Cuts the network for each of `SHARES`: yields it, what is kept, and the variables left.

    The kernels are truncated and keep their shapes, so that all cuts share a compiled program.
    Their factors give the same outputs.
    """
    params = variables["params"]
    curve = rmtjax.trade_off(params, where=is_pointwise, axes=axes, moments=moments)
    for share in SHARES:
        plan = curve.plan(share)
        cost = rmtjax.Report(plan).totals
        lower = rmtjax.truncate(params, plan, moments=moments)
        yield share, cost.parameters_after / cost.parameters, {**variables, "params": lower}


def study(
    variables: Mapping[str, PyTree], known: Crops, measured: Mapping[str, Crops], key: jax.Array
) -> list[dict[str, Any]]:
    """Returns a record for each method, share and set of crops.

    Args:
      variables: Of the pretrained network, not folded.
      known: Crops that the moments come from.
      measured: Sets of crops on which the logits of the dense and of the cut network are compared.
      key: Of the directions of the gradients.
    """
    networks = {False: variables, True: fold(variables)}
    # The inputs of the kernels are those of the network as it is.
    module, parts = EfficientNetLite0(folded=True), batches(known)
    moments = rmtjax.linen.moments(module, networks[True], parts, where=is_pointwise, key=key)
    axes = dict(moments.axes)
    dense, records = {name: logits(variables, crops) for name, crops in measured.items()}, []
    for method, (folded, change) in METHODS.items():
        for share, kept, lower in cut(networks[folded], axes, change(moments)):
            for name, crops in measured.items():
                left = compare(dense[name], logits(lower, crops))
                records.append({"method": method, "share": share, "on": name, "kept": kept, **left})
    return records
