"""Dynamical low-rank training (2205.13571): factors follow the gradient flow of the dense kernel.

A kernel is U S V^T with orthonormal U and V. A step of the integrator is

- K-step: K = U S moves by the gradient with V fixed; L-step: L = V S^T moves with U fixed;
- the bases become orthonormal bases of [K, U] and [L, V], with twice the columns;
- S-step: S, seen in these bases, moves by the gradient;
- truncation: the singular values of S that are kept are those before a tail of relative norm tau,
  and at most as many as the rank that is allowed.
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


def _basis(first, second):
    """Returns an orthonormal basis of the columns of both, at most as many as rows."""
    return jnp.linalg.qr(jnp.concatenate([first, second], axis=1))[0]


def _truncate(u, s, v, rank: int, tau) -> Low:
    """Returns the kernel with the values before a tail of relative norm tau, at most `rank`."""
    p, values, qt = jnp.linalg.svd(s)
    tails = jnp.sqrt(jnp.cumsum(jnp.square(values)[::-1])[::-1])
    # Entry k of the tails is the norm of what is left if k values are kept.
    keep = (tails > tau * tails[0]) & (jnp.arange(values.size) < rank)
    values = jnp.where(keep, values, 0)[:rank]
    return Low(u @ p[:, :rank], jnp.diag(values), v @ qt.T[:, :rank])


def step(loss, bases: Bases, shapes, rate, tau, optimizer, state) -> tuple[Bases, Any]:
    """Returns the bases after a step of the integrator.

    Args:
      loss: A function of a tree with `Factors`.
      bases: Before.
      shapes: Path to the shape of a kernel.
      rate: Learning rate of kernels.
      tau: Relative norm of the tail that is cut.
      optimizer, state: Of the other parameters.
    """
    low, rest = bases

    def with_kernels(pairs, rest):
        found = {path: _factors(*pair, shapes[path]) for path, pair in pairs.items()}
        return loss(replaced(rest, found))

    k = {path: one.u @ one.s for path, one in low.items()}
    l_ = {path: one.v @ one.s.T for path, one in low.items()}
    of_k = lambda k: with_kernels({p: (k[p], one.v.T) for p, one in low.items()}, rest)
    of_l = lambda l_: with_kernels({p: (one.u, l_[p].T) for p, one in low.items()}, rest)
    move = partial(jax.tree.map, lambda old, slope: old - rate * slope)
    k, l_ = move(k, jax.grad(of_k)(k)), move(l_, jax.grad(of_l)(l_))
    u = {path: _basis(k[path], one.u) for path, one in low.items()}
    v = {path: _basis(l_[path], one.v) for path, one in low.items()}
    s = {p: (u[p].T @ one.u) @ one.s @ (one.v.T @ v[p]) for p, one in low.items()}
    of_s = lambda s, rest: with_kernels({p: (u[p] @ s[p], v[p].T) for p in low}, rest)
    slopes, others = jax.grad(of_s, argnums=(0, 1))(s, rest)
    s = move(s, slopes)
    updates, state = optimizer.update(others, state, rest)
    low = {p: _truncate(u[p], s[p], v[p], one.s.shape[0], tau) for p, one in low.items()}
    return Bases(low, optax.apply_updates(rest, updates)), state


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

    def init(bases, hyper, extra):
        del extra
        return trainer.adam(hyper, steps).init(bases.rest), jnp.zeros((), jnp.int32)

    def advance(carry, inputs, data, hyper, extra):
        del extra
        (bases, (state, count)), (index, key) = carry, inputs
        loss = partial(trainer.cross_entropy, module, x=data[0][index], y=data[1][index], key=key)
        rate, optimizer = cosine(count) * hyper["flow"], trainer.adam(hyper, steps)
        bases, state = step(loss, bases, shapes_of, rate, tau, optimizer, state)
        return bases, (state, count + 1)

    return Program(init, advance)


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
