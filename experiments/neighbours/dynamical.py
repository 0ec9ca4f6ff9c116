"""Dynamical low-rank training (2205.13571): factors follow the gradient flow of the dense kernel.

A kernel is U S V^T with orthonormal U and V. A step of the integrator is

- K-step: K = U S moves by the gradient with V fixed; L-step: L = V S^T moves with U fixed;
- the bases become orthonormal bases of [K, U] and [L, V], with twice the columns;
- S-step: S, seen in these bases, moves by the gradient;
- truncation: the singular values of S that are kept are those before a tail of relative norm tau,
  and at most as many as the rank that is allowed.

K, L and S move by Adam, as in the authors' code for dense networks. Moments are numbers in bases,
so they turn with the bases: without that, those of S belong to other directions at each step.
"""

from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import rmtjax
from experiments.neighbours import allocation, sizes, trainer
from experiments.neighbours.sizes import Thin
from experiments.neighbours.tensors import replaced
from experiments.neighbours.trainer import Program, Setting, start, Training


class Low(NamedTuple):
    """A kernel in its bases; U and V have orthonormal columns, the kernel its own shape."""

    u: Any
    s: Any
    v: Any


class Bases(NamedTuple):
    """The state of training: kernels in their bases by path, and all other parameters."""

    low: dict[str, Low]
    rest: Any


class States(NamedTuple):
    """States of optimizers: of all other parameters, and of K, L and S by path."""

    rest: Any
    k: Any
    l: Any  # noqa: E741  # as in the paper
    s: Any


_PLAIN = optax.identity()


def _factors(left, right, like) -> rmtjax.Factors:
    """Returns factors in the shape of a kernel (inputs, outputs)."""
    return rmtjax.Factors(left.reshape(*like[:-1], -1), right)


def hold(params, ranks: Mapping[str, int]) -> Bases:
    """Returns parameters with some kernels in bases of given ranks."""
    leaves, low = sizes.leaves_by_path(params), {}
    for path, rank in ranks.items():
        matrix = leaves[path].reshape(-1, leaves[path].shape[-1])
        u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
        low[path] = Low(u[:, :rank], jnp.diag(s[:rank]), vt[:rank].T)
    return Bases(low, params)


def init(bases: Bases, optimizer, scale=_PLAIN) -> States:
    """Returns the states before the first step; see `step` for the arguments."""
    k, l_ = _sides(bases.low)
    s = {path: one.s for path, one in bases.low.items()}
    return States(optimizer.init(bases.rest), *map(scale.init, (k, l_, s)))


def _sides(low: Mapping[str, Low]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns K = U S and L = V S^T by path."""
    k = {path: one.u @ one.s for path, one in low.items()}
    return k, {path: one.v @ one.s.T for path, one in low.items()}


def _basis(first, second):
    """Returns an orthonormal basis of the columns of both, at most as many as rows.

    Columns of zeros are directions that were cut. They add none: their place in the basis is zero.
    """
    both = jnp.concatenate([first, second], axis=1)
    alive = jnp.any(both != 0, axis=0)
    order = jnp.argsort(~alive)  # those of zeros last: they must not take the place of others
    q = jnp.linalg.qr(both[:, order])[0]
    return q * alive[order][None, : q.shape[1]]


def _truncate(u, s, v, rank: int, tau) -> Low:
    """Returns the kernel with the values before a tail of relative norm tau, at most `rank`."""
    p, values, qt = jnp.linalg.svd(s, full_matrices=False)
    tails = jnp.sqrt(jnp.cumsum(jnp.square(values)[::-1])[::-1])
    # Entry k of the tails is the norm of what is left if k values are kept.
    keep = ((tails > tau * tails[0]) & (jnp.arange(values.size) < rank))[:rank]
    values = jnp.where(keep, values[:rank], 0)
    return Low(u @ p[:, :rank] * keep[None], jnp.diag(values), v @ qt.T[:, :rank] * keep[None])


def _turn(state, left: Mapping[str, Any], right: Mapping[str, Any]):
    """Returns moments of Adam in other bases: A m B, and (A o A) v (B o B) of squares.

    The second is what A m B has if the entries of m are independent. Other states stay.
    """
    if not isinstance(state, optax.ScaleByAdamState):
        return state
    turned = lambda power, tree: {p: power(left[p]) @ tree[p] @ power(right[p]) for p in tree}
    return state._replace(mu=turned(lambda a: a, state.mu), nu=turned(jnp.square, state.nu))


def _turn_sides(states: States, before, after) -> States:
    """Returns the states with the columns of K and L in new bases: those of V and of U."""
    eye = lambda side: {path: jnp.eye(len(getattr(one, side))) for path, one in before.items()}
    to = lambda side: {
        path: getattr(one, side).T @ getattr(after[path], side) for path, one in before.items()
    }
    k, l_ = _turn(states.k, eye("u"), to("v")), _turn(states.l, eye("v"), to("u"))
    return states._replace(k=k, l=l_)


def step(
    loss, bases: Bases, shapes, rate, tau, optimizer, states: States, scale=_PLAIN
) -> tuple[Bases, States]:
    """Returns the bases after a step of the integrator.

    Args:
      loss: A function of a tree with `Factors`.
      bases: Before.
      shapes: Path to the shape of a kernel.
      rate: Learning rate of kernels.
      tau: Relative norm of the tail that is cut.
      optimizer: Of the other parameters.
      states: By `init`, or of the last step.
      scale: What optax makes of the slopes of K, L and S before the rate: Adam, or none.
    """
    low, rest = bases

    def with_kernels(pairs, rest):
        found = {path: _factors(a, b, shapes[path]) for path, (a, b) in pairs.items()}
        return loss(replaced(rest, found))

    def of_sides(k, l_):
        # K V^T + U (L - V S^T)^T is the kernel, with the slopes of both steps in one pass.
        join = lambda *parts: jnp.concatenate(parts, axis=1)
        pair = lambda p, o: (join(k[p], o.u), join(o.v, l_[p] - o.v @ o.s.T).T)
        return with_kernels({path: pair(path, one) for path, one in low.items()}, rest)

    def moved(tree, slopes, state):
        updates, state = scale.update(slopes, state)
        return jax.tree.map(lambda old, update: old - rate * update, tree, updates), state

    (k, l_), (of_rest, *_) = _sides(low), states
    slopes = jax.grad(of_sides, argnums=(0, 1))(k, l_)
    k, of_k = moved(k, slopes[0], states.k)
    l_, of_l = moved(l_, slopes[1], states.l)
    u = {path: _basis(k[path], one.u) for path, one in low.items()}
    v = {path: _basis(l_[path], one.v) for path, one in low.items()}
    a = {path: u[path].T @ one.u for path, one in low.items()}
    b = {path: one.v.T @ v[path] for path, one in low.items()}
    s = {path: a[path] @ one.s @ b[path] for path, one in low.items()}
    of_s = lambda s, rest: with_kernels({p: (u[p] @ s[p], v[p].T) for p in low}, rest)
    slopes, others = jax.grad(of_s, argnums=(0, 1))(s, rest)
    s, in_s = moved(s, slopes, _turn(states.s, a, b))
    updates, of_rest = optimizer.update(others, of_rest, rest)
    new = {p: _truncate(u[p], s[p], v[p], one.s.shape[0], tau) for p, one in low.items()}
    back = ({p: new[p].u.T @ u[p] for p in new}, {p: v[p].T @ new[p].v for p in new})
    states = _turn_sides(States(of_rest, of_k, of_l, _turn(in_s, *back)), low, new)
    return Bases(new, optax.apply_updates(rest, updates)), states


def thin(bases: Bases, shapes) -> Any:
    """Returns the parameters with factors of the ranks that training has kept."""
    found = {}
    for path, one in bases.low.items():
        rank = max(1, int((jnp.diag(one.s) > 0).sum()))
        left = one.u[:, :rank] * jnp.diag(one.s)[None, :rank]
        found[path] = _factors(left, one.v[:, :rank].T, shapes[path])
    return replaced(bases.rest, found)


@lru_cache(maxsize=64)
def _program(module, kept: tuple, shapes: tuple, tau: float, steps: int) -> Program:
    """Returns the integrator for kernels of given shapes."""
    del kept  # the ranks are shapes of the bases
    shapes_of = dict(shapes)
    cosine = optax.cosine_decay_schedule(1.0, steps)

    scale = optax.scale_by_adam()

    def begin(bases, hyper, extra):
        del extra
        return init(bases, trainer.adam(hyper, steps), scale), jnp.zeros((), jnp.int32)

    def advance(carry, inputs, data, hyper, extra):
        del extra
        (bases, (states, count)), (index, key) = carry, inputs
        loss = partial(trainer.cross_entropy, module, x=data[0][index], y=data[1][index], key=key)
        rate, optimizer = cosine(count) * hyper["flow"], trainer.adam(hyper, steps)
        bases, states = step(loss, bases, shapes_of, rate, tau, optimizer, states, scale)
        return bases, (states, count + 1)

    return Program(begin, advance)


def train(
    setting: Setting, before: Training, ranks: Mapping[str, int], tau: float = 0.0, module=None
) -> Training:
    """Trains with kernels in bases of at most these ranks, for all steps of a run."""
    leaves = sizes.leaves_by_path(before.params)
    shapes = {path: tuple(leaves[path].shape) for path in ranks}
    steps = trainer.steps_of(setting.track, 1.0)
    key = tuple(ranks.items()), tuple(shapes.items()), tau, steps
    program = _program(module or setting.module, *key)
    held = before._replace(params=hold(before.params, ranks))
    after = trainer.loop(setting, held, program, steps)
    return after._replace(params=thin(after.params, shapes))


def dynamical(setting: Setting) -> Thin:
    """Trains at the ranks of truncated SVD from the first step on."""
    ranked = allocation.kept(setting, allocation.dense, allocation.by_energy)
    return Thin(train(setting, start(setting), ranked))
