"""Verbs of one matrix: spectra, cuts, scales, bounds, grids and trains."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

import rmtjax
from campaign.leaves import DTYPES, FILLS, Leaf, SPLITS, weighted
from campaign.oracle import eps_of, lowered
from campaign.verbs import bounds, figures, numbers
from campaign.verbs.transforms import slopes_of

SHAPES = {
    (60, 90): 6,
    (90, 60): 3,
    (64, 64): 2,
    (4, 52): 1,
    (52, 3): 1,
    (1, 60): 1,
    (1, 1): 1,
    (0, 3): 1,
    (60,): 1,
    (2, 60, 52): 1,
}
MATRICES = st.builds(
    Leaf,
    weighted(SHAPES),
    weighted(DTYPES),
    weighted(FILLS),
    st.integers(0, 99),
    st.booleans(),
    weighted(SPLITS),
)


def is_matrix(leaf):
    """Whether an array is what these verbs take: real, floating, with two axes and entries."""
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return leaf.ndim == 2 and leaf.size > 0 and floating


def check_spectrum(leaf, exact):
    found = rmtjax.spectrum(leaf)
    numbers.check_values(found.eigenvalues, numbers.eigenvalues_of(exact), exact)
    assert float(found.ratio) == np.float32(min(exact.shape) / max(exact.shape))


def check_pooled(leaf, exact):
    for ratio in (1.0, 0.5):
        found = rmtjax.pooled_spectrum(leaf, ratio=ratio)
        blocks = numbers.blocks(exact, ratio)
        values = np.concatenate([numbers.eigenvalues_of(block) for block in blocks])
        numbers.check_values(found.eigenvalues, np.sort(values)[::-1], exact)


def check_metrics(leaf, exact):
    spectrum = rmtjax.spectrum(leaf)
    numbers.check_metrics(rmtjax.metrics_of(spectrum), spectrum, exact)


def check_rules(leaf, exact):
    numbers.check_ranks(rmtjax.spectrum(leaf))


def check_equalized(leaf, exact):
    for sides in ("both", "rows", "columns"):
        even = rmtjax.equalize(leaf, sides=sides)
        numbers.check_scales(even, exact, sides)


def check_truncated(leaf, exact):
    finite = np.isfinite(exact).all()
    for rank in (0, 1, 3):
        cut, wanted = rmtjax.truncate_matrix(leaf, rank), lowered(exact, rank) if finite else exact
        if finite or rank:  # of no directions, NaN leaves zeros
            numbers.check_near(cut, wanted, exact, eps_of(leaf))
    left, right = rmtjax.factorize_matrix(leaf, 1)
    product = np.asarray(left, np.float64) @ np.asarray(right, np.float64)
    wanted = lowered(exact, 1) if finite else exact
    numbers.check_near(product, wanted, exact, 4 * eps_of(leaf))


def check_traps(leaf, exact):
    traps = rmtjax.find_traps(leaf, jax.random.key(0), draws=2)
    numbers.check_traps(traps, exact)
    peak = np.abs(exact).max()
    if 1e-30 < peak < np.inf:  # the same spikes at any scale
        unit = np.ldexp(exact, -np.frexp(peak)[1]).astype(np.float32)
        same = rmtjax.find_traps(unit, jax.random.key(0), draws=2)
        count = lambda found: [len(found.spikes), *map(len, found.shuffled)]
        assert count(traps) == count(same)


def check_tails(leaf, exact):
    for rank in (0, 2):
        total = rmtjax.lowrank.tail_sum(leaf, rank)
        moved = rmtjax.lowrank.prox_tail(leaf, rank, 0.5)
        numbers.check_tails(total, moved, exact, rank, eps_of(leaf))
    if isinstance(leaf, jax.Array) and np.isfinite(exact).all():
        slope = slopes_of(lambda leaf: rmtjax.lowrank.tail_sum(leaf, 0), leaf)
        # It is W over its values: their sum is the product with W.
        total = np.linalg.svd(exact, compute_uv=False).sum()
        found = np.sum(np.asarray(slope, np.float64) * exact)
        assert abs(found - total) <= (1e-3 + 4 * eps_of(leaf)) * total


def check_train(leaf, exact):
    modes_of = rmtjax.lowrank.balanced_modes
    rows, columns = (modes_of(max(side, 1), 2) for side in (*exact.shape, 1)[:2])
    for modes in (rmtjax.lowrank.operator_modes, rmtjax.lowrank.state_modes):
        fit = rmtjax.lowrank.tensor_train(leaf, modes(rows, columns), tolerance=0.3)
        size = rmtjax.lowrank.train_size(modes(rows, columns), max(fit.train.bonds))
        numbers.check_train(fit, exact, eps_of(leaf), 0.3)
        assert sum(core.size for core in fit.train.cores) <= size
        if not np.isfinite(exact).all():
            return
        spectra = rmtjax.lowrank.bond_spectra(fit.train)
        entropies = rmtjax.lowrank.bond_entropies(fit.train)
        numbers.check_entropies(spectra, entropies)


def check_grid(leaf, exact):
    for bits, axis in ((1, None), (3, 1), ((0, 1, 2, 4), 0)):
        grid = rmtjax.projections.quantize_bits(leaf, bits, axis)
        rounded = rmtjax.projections.project_bits(leaf, bits, axis)
        numbers.check_grid(grid, rounded, exact, bits, eps_of(leaf))


def check_projected(leaf, exact):
    lower = rmtjax.projections.project_rank(leaf, rmtjax.ranks.fixed(2))
    wanted = lowered(exact, 2) if np.isfinite(exact).all() else exact
    numbers.check_near(lower, wanted, exact, eps_of(leaf))


def check_order(leaf, exact):
    if exact.shape[0] % 4 == 0:
        order = rmtjax.patterns.permute_inputs(leaf, (2, 4), sweeps=1)
        numbers.check_order(order, exact)


VERBS = {
    "spectrum": check_spectrum,
    "pooled_spectrum": check_pooled,
    "metrics_of": check_metrics,
    "ranks": check_rules,
    "equalize": check_equalized,
    "truncate_matrix": check_truncated,
    "find_traps": check_traps,
    "tail_sum": check_tails,
    "tensor_train": check_train,
    "quantize_bits": check_grid,
    "project_rank": check_projected,
    "permute_inputs": check_order,
    "operator_norm": bounds.check_norm,
    "data_path": bounds.check_path,
    "certify": bounds.check_chain,
    "plots": figures.check_spectrum,
}
# Those that say no to what is not finite.
CAREFUL = ("permute_inputs",)


def run_matrix(tally, spec, names=VERBS):
    """All verbs on one array. What is a matrix must not be refused."""
    leaf, told = spec.array(), str(spec)
    exact = np.asarray(leaf).astype(np.complex128 if spec.dtype == "complex64" else np.float64)
    fine = is_matrix(leaf)
    for name in names:
        may_refuse = not fine or (name in CAREFUL and not np.isfinite(exact).all())
        with tally.trial(f"matrix: {name}", told, must=not may_refuse):
            VERBS[name](leaf, exact)


def run(tally, rounds, seed, run_one=run_matrix):
    """Tries so many arrays."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=rounds,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(MATRICES)
    def trial(spec):
        run_one(tally, spec)

    trial()
