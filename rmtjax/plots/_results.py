"""Draws results: ranks of kernels, sizes, training, accuracy of networks, certificates."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TYPE_CHECKING

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Real

from rmtjax._types import check_type
from rmtjax.planning import LayerPlan, TradeOff
from rmtjax.plots._style import BLUE, dot_size, finish, new_axes, style, VERMILION

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Numbers = Real[ArrayLike, " k"] | Sequence[float | int]
Intervals = Float[ArrayLike, "k 2"] | Sequence[Sequence[float]]


def layers(plan: Mapping[str, LayerPlan], *, ax: "Axes | None" = None, title: str = "") -> "Axes":
    """Draws the number of spikes, the planned rank and the full rank of each kernel.

    Args:
      plan: From `rmtjax.plan`, or `report.plan`; anything else raises TypeError. The first kernel
        is on top. A line under the axis counts kernels without a spectrum.
      ax: Where to draw; by default on a new figure, as high as the kernels need.
      title: Above the axes.

    Examples:
      >>> import jax, rmtjax
      >>> from matplotlib.figure import Figure
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (80, 60))}
      >>> ax = Figure().subplots()
      >>> shown = rmtjax.plots.layers(rmtjax.plan(params), title="One kernel", ax=ax)
      >>> ax.get_title()
      'One kernel'
    """
    check_type("plan", plan, Mapping, "For a report, give `report.plan`.")
    shown = {path: row for path, row in plan.items() if row.spectrum is not None}
    ax = new_axes(height=max(1.5 + 0.22 * len(shown), 2.5)) if ax is None else ax
    lines = np.arange(len(shown))
    full = [row.spectrum.eigenvalues.shape[-1] for row in shown.values() if row.spectrum]
    ranks = np.array([row.rank for row in shown.values()], int)
    # A stack has one rank, that of its matrix with the most spikes.
    spikes = [np.max(row.fit.num_spikes) for row in shown.values() if row.fit]
    ax.barh(lines, full, height=0.5, color="0.85", label="full rank")
    ax.plot(ranks, lines, "o", color=BLUE, fillstyle="none", markersize=8, label="rank")
    ax.plot(spikes, lines, "x", color=VERMILION, label="spikes")
    ax.set_yticks(lines, list(shown), fontsize="small")
    ax.set_ylim(len(shown) - 0.4, -0.6)
    # The number of spikes may be 0, which a logarithmic axis cannot show.
    ax.set_xscale("symlog", linthresh=1)
    # Room for the circle of a full rank.
    ax.set_xlim(-0.2, 1.4 * max(full, default=1))
    label = "number of directions (logarithmic above 1)"
    if hidden := len(plan) - len(shown):
        label += f"\nNot drawn: {hidden} kernel{'s' * (hidden > 1)} without a spectrum"
    return finish(ax, label, "", title, beside=True)


def training(
    records: Sequence[Mapping[str, Any]], *, ax: "Axes | None" = None, title: str = ""
) -> "Axes":
    """Draws the rank and the number of spikes of each kernel over training.

    The rank is a solid line. The number of signal directions is a dashed line that begins at the
    first fit.

    Args:
      records: Lines of a log: the results of `rmtjax.metrics`, each with its "step".
      ax, title: As in `layers`.

    Raises:
      ValueError: No record has a rank, or one has no "step".
      TypeError: `records` is not a sequence.

    Examples:
      >>> import rmtjax
      >>> from matplotlib.figure import Figure
      >>> records = [{"step": step, "rank/kernel": 60 - step} for step in (0, 10, 20)]
      >>> ax = rmtjax.plots.training(records, ax=Figure().subplots())
      >>> len(ax.get_lines())
      3
    """
    check_type("records", records, Sequence, "Put a single record into a list.")
    paths = dict.fromkeys(
        key.removeprefix("rank/") for record in records for key in record if key.startswith("rank/")
    )
    if not paths or not all("step" in record for record in records):
        raise ValueError(
            '`records` must have keys that begin with "rank/", and a "step" each: dictionaries '
            '`{"step": step, **rmtjax.metrics(opt_state)}`.'
        )
    ax = new_axes(names=paths) if ax is None else ax
    dot = dot_size(len(records))
    for index, path in enumerate(paths):
        for name, line in (("rank", "-"), ("signal", "--")):
            key = f"{name}/{path}"
            # Before the first fit the number of signal directions is 0. It is not drawn.
            points = [(r["step"], r[key]) for r in records if r.get(key)]
            shown = style(index) | {"linestyle": line, "label": path if name == "rank" else None}
            ax.plot(*np.reshape(points, (-1, 2)).T, fillstyle="none", markersize=dot, **shown)
    ax.plot([], [], "--", color="0.4", label="signal")
    ax.set_yscale("log")
    return finish(ax, "step", "number of directions", title)


def history(
    records: Iterable[Mapping[str, Any]],
    column: str = "spikes",
    *,
    ax: "Axes | None" = None,
    title: str = "",
) -> "Axes":
    """Draws a column of each kernel over training, as `rmtjax.monitor` measures it.

    A cross marks the looks at which the law no longer fitted a kernel that it had fitted before.

    Args:
      records: An `rmtjax.History`, or its records.
      column: Name of a column that was measured.
      ax, title: As in `layers`.

    Raises:
      ValueError: No record has the column, or one has no "step".

    Examples:
      >>> import rmtjax
      >>> from matplotlib.figure import Figure
      >>> records = [{"step": step, "monitor/spikes/kernel": step // 10} for step in (0, 10, 20)]
      >>> ax = rmtjax.plots.history(records, ax=Figure().subplots())
      >>> len(ax.get_lines())
      1
    """
    records, prefix = list(records), f"monitor/{column}/"
    paths = dict.fromkeys(
        key.removeprefix(prefix) for record in records for key in record if key.startswith(prefix)
    )
    if not paths or not all("step" in record for record in records):
        raise ValueError(
            f'`records` must have keys that begin with "{prefix}", and a "step" each: those of a '
            "`rmtjax.History`, of a monitor with this column."
        )
    ax = new_axes(names=paths) if ax is None else ax
    dot = dot_size(len(records))
    crosses: list[Any] = []
    for index, path in enumerate(paths):
        seen = [record for record in records if prefix + path in record]
        steps, values = zip(
            *((record["step"], record[prefix + path]) for record in seen), strict=True
        )
        ax.plot(steps, values, fillstyle="none", markersize=dot, label=path, **style(index))
        left = [bool(record.get(f"monitor/left_law/{path}")) for record in seen]
        crosses += [point for *point, gone in zip(steps, values, left, strict=True) if gone]
    if crosses:
        ax.plot(*np.transpose(crosses), "x", color="0.2", markersize=dot, label="left the law")
    return finish(ax, "step", column.replace("_", " "), title)


def accuracy(
    parameters: Numbers,
    accuracies: Numbers,
    intervals: Intervals | None = None,
    *,
    names: Sequence[str] | None = None,
    ax: "Axes | None" = None,
    title: str = "",
) -> "Axes":
    """Draws accuracy against the number of parameters, with intervals.

    Args:
      parameters: Of each network, above 0; the axis is logarithmic.
      accuracies: Of each network, in %.
      intervals: Lower and upper end of each interval; NaN where there is none.
      names: Of each network, for the legend. A line joins the networks of one name.
      ax, title: As in `layers`.

    Raises:
      ValueError: The arguments are not of one length.

    Examples:
      >>> import rmtjax
      >>> from matplotlib.figure import Figure
      >>> ax = Figure().subplots()
      >>> shown = rmtjax.plots.accuracy([1000, 200], [98.0, 97.5], names=["dense", "pruned"], ax=ax)
      >>> ax.get_xscale()
      'log'
    """
    x, y = np.asarray(parameters, float), np.asarray(accuracies, float)
    ends = np.full((x.size, 2), np.nan) if intervals is None else np.asarray(intervals, float)
    names = ["network"] * x.size if names is None else list(names)
    if not x.shape == y.shape == (len(names),) or ends.shape != (x.size, 2):
        raise ValueError(
            "`parameters`, `accuracies` and `names` must be of one length k and `intervals` of "
            f"shape (k, 2), got {x.shape}, {y.shape}, {len(names)} and {ends.shape}."
        )
    ax = new_axes() if ax is None else ax
    for index, name in enumerate(dict.fromkeys(names)):
        named = [i for i in np.argsort(x, kind="stable") if names[i] == name]
        error = np.abs(ends[named] - y[named, None]).T
        # Networks of one size cover each other. Caps of several widths keep their intervals apart.
        cap = 3 + 2 * (index % 4)
        ax.errorbar(x[named], y[named], error, capsize=cap, linewidth=1, label=name, **style(index))
    ax.set_xscale("log")
    return finish(ax, "parameters", "accuracy, %", title, form="k")


def trade_off(
    curves: TradeOff | Mapping[str, TradeOff], *, ax: "Axes | None" = None, title: str = ""
) -> "Axes":
    """Draws the energy that plans remove against the share of the parameters that they keep.

    Args:
      curves: From `rmtjax.trade_off`, or several of them by name; anything else raises TypeError.
      ax, title: As in `layers`.

    Examples:
      >>> import jax, rmtjax
      >>> from matplotlib.figure import Figure
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (80, 60))}
      >>> ax = rmtjax.plots.trade_off(rmtjax.trade_off(params), ax=Figure().subplots())
      >>> len(ax.get_lines())
      1
    """
    named = {"": curves} if isinstance(curves, TradeOff) else curves
    check_type("curves", named, Mapping, "Give what `rmtjax.trade_off` returns.")
    ax = new_axes() if ax is None else ax
    for index, (name, curve) in enumerate(named.items()):
        check_type(f"curves[{name!r}]", curve, TradeOff, "Give what `rmtjax.trade_off` returns.")
        shown = style(index) | {"marker": "", "label": name or None}
        # A plan lands between two points too: on the line up to a step of a rank.
        ax.plot(curve.shares, curve.removed, **shown)
    ax.set_xlim(right=1)
    ax.set_ylim(bottom=0)
    return finish(ax, "share of the parameters", "mean share of energy removed", title)


def certificate(
    margins: Numbers, bounds: Numbers, *, ax: "Axes | None" = None, title: str = ""
) -> "Axes":
    r"""Draws a bound on the decrease of each sample's margin against the margin.

    Below the line the bound is less than the margin, so the removal cannot change the prediction.
    The legend has both counts.

    Args:
      margins: The largest logit minus the second largest one, of the dense network.
      bounds: By how much the removal can lower that margin: twice the bound on the change of a
        logit. Another number of bounds raises ValueError.
      ax, title: As in `layers`.

    Examples:
      >>> import jax.numpy as jnp, rmtjax
      >>> from matplotlib.figure import Figure
      >>> ax = Figure().subplots()
      >>> shown = rmtjax.plots.certificate(jnp.array([1.0, 3.0]), jnp.array([2.0, 2.0]), ax=ax)
      >>> len(ax.get_legend().get_texts())
      3
    """
    x, y = np.asarray(margins, float), np.asarray(bounds, float)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(
            f"`margins` and `bounds` must have one number a sample, got {x.shape} and {y.shape}."
        )
    ax = new_axes() if ax is None else ax
    # A bound that is not finite is not below the margin, so its prediction may change.
    safe = y < x
    series = (safe, "cannot change", "o", BLUE), (~safe, "may change", "x", VERMILION)
    for chosen, name, marker, color in series:
        label, dot = f"{name}: {chosen.sum()} of {x.size}", dot_size(x.size)
        ax.plot(x[chosen], y[chosen], marker, color=color, markersize=dot, label=label)
    ax.axline((0, 0), slope=1, color="black", linestyle="--", label="bound = margin")
    ax.set_xlim(left=np.nanmin(x, initial=0))
    ax.set_ylim(bottom=0)
    return finish(ax, "margin", "bound on its fall", title)
