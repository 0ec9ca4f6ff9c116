"""Histories of training: prune, factorize, transfer, save, restore and plan again, in any order."""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import HealthCheck, Phase, seed as seeded, settings, strategies as st
from hypothesis.stateful import (
    initialize,
    invariant,
    precondition,
    rule,
    RuleBasedStateMachine,
    run_state_machine_as_test,
)

import rmtjax
from rmtjax._axes import is_factors, kernel_shape

KERNELS = {"a/kernel": (60, 64), "b/kernel": (50, 72)}
FIRST = rmtjax.ranks.fixed(6)


def dense(leaf):
    """A kernel in float64, multiplied out."""
    if is_factors(leaf):
        return np.asarray(leaf.left, np.float64) @ np.asarray(leaf.right, np.float64)
    return np.asarray(leaf, np.float64)


class Training(RuleBasedStateMachine):
    """Parameters and the state of their optimizer, beside what must hold of them.

    The model is the kernels in float64 and the largest rank that each may have: a cut lowers it,
    and a step may raise it up to the sides again.
    """

    @initialize(seed=st.integers(0, 99), momentum=st.booleans())
    def begin(self, seed, momentum):
        rng = np.random.default_rng(seed)
        self.rng = rng
        leaf = lambda shape: jnp.asarray(rng.normal(size=shape) + 1, jnp.float32)
        self.params = {
            name[0]: {"kernel": leaf(shape), "bias": jnp.zeros(shape[1])}
            for name, shape in KERNELS.items()
        }
        first = optax.sgd(0.01, 0.9) if momentum else optax.adam(1e-3)
        self.optimizer = optax.chain(first, rmtjax.prune_spectrum(3, rule=FIRST, max_rise=None))
        self.state = self.optimizer.init(self.params)
        self.update = jax.jit(self.optimizer.update)
        self.steps = 0

    def kernels(self):
        return {f"{name}/kernel": self.params[name]["kernel"] for name in ("a", "b")}

    @rule()
    def step(self):
        gradient = lambda leaf: jnp.asarray(self.rng.normal(size=leaf.shape), leaf.dtype)
        gradients = jax.tree.map(gradient, self.params)
        updates, self.state = self.update(gradients, self.state, self.params)
        self.params = optax.apply_updates(self.params, updates)
        self.steps += 1
        if self.steps % 3 == 0:
            for path, leaf in self.kernels().items():
                if not is_factors(leaf):
                    s = np.linalg.svd(dense(leaf), compute_uv=False)
                    # The update is rounded in float32.
                    assert s[6] < 1e-4 * s[0], path
                    assert int(rmtjax.metrics(self.state)[f"rank/{path}"]) == 6

    @rule(rank=st.sampled_from([4, 8, 16]), factorize=st.booleans())
    def cut(self, rank, factorize):
        before = {path: dense(leaf) for path, leaf in self.kernels().items()}
        plan = rmtjax.plan(self.params, rule=rmtjax.ranks.fixed(rank), multiple=1)
        new = (rmtjax.factorize if factorize else rmtjax.truncate)(self.params, plan)
        if factorize:
            self.state = rmtjax.transfer_opt_state(self.state, self.params, new)
        self.params = new
        for path, leaf in self.kernels().items():
            u, s, vt = np.linalg.svd(before[path], full_matrices=False)
            wanted = (u[:, : plan[path].rank] * s[: plan[path].rank]) @ vt[: plan[path].rank]
            assert np.linalg.norm(dense(leaf) - wanted) < 1e-4 * np.linalg.norm(wanted)

    @precondition(lambda self: any(map(is_factors, self.kernels().values())))
    @rule()
    def merge(self):
        before = {path: dense(leaf) for path, leaf in self.kernels().items()}
        self.params = rmtjax.merge(self.params)
        # Moments of factors are not those of a kernel: the optimizer starts again.
        self.state = self.optimizer.init(self.params)
        self.steps = 0
        for path, leaf in self.kernels().items():
            np.testing.assert_allclose(dense(leaf), before[path], rtol=1e-4, atol=1e-4)

    @rule(name=st.sampled_from(["a.safetensors", "folder"]))
    def save_and_restore(self, name):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, name)
            rmtjax.checkpoint.save(path, self.params)
            restored = rmtjax.checkpoint.restore(path, like=self.params)
        assert jax.tree.structure(restored) == jax.tree.structure(self.params)
        for new, old in zip(*map(jax.tree.leaves, (restored, self.params)), strict=True):
            assert np.asarray(new).tobytes() == np.asarray(old).tobytes()
        self.params = restored

    @rule()
    def plan_again(self):
        plan = rmtjax.plan(self.params, fits=rmtjax.noise_levels(self.state))
        assert plan.keys() == KERNELS.keys()
        assert str(plan)
        again = rmtjax.plan(self.params, fits=rmtjax.noise_levels(self.state))
        assert str(again) == str(plan)

    @invariant()
    def holds(self):
        if not hasattr(self, "params"):
            return
        for path, leaf in self.kernels().items():
            assert kernel_shape(leaf) == KERNELS[path]
            assert np.isfinite(dense(leaf)).all()
            assert all(part.dtype == jnp.float32 for part in jax.tree.leaves(leaf))


def run(tally, rounds, seed):
    """Tries so many histories of up to 12 events."""
    options = settings(
        max_examples=rounds,
        stateful_step_count=12,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    with tally.trial("histories", f"seed {seed}"):
        tally.tried["histories"] += rounds - 1
        run_state_machine_as_test(seeded(seed)(Training), settings=options)
