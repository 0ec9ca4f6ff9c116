"""Numbers of one matrix by NumPy in float64, and how far those of the package may be from them."""

import numpy as np

import rmtjax

HIGHEST, LOWEST = 3.4e38, 1.2e-38  # of float32
RULES = (
    rmtjax.ranks.bema(),
    rmtjax.ranks.gavish_donoho(),
    rmtjax.ranks.energy(0.9),
    rmtjax.ranks.fixed(3),
    rmtjax.ranks.size(0.5, multiple=1),
)


def eigenvalues_of(exact):
    finite = np.isfinite(exact).all()
    values = np.linalg.svd(exact, compute_uv=False) if finite else np.full(min(exact.shape), np.nan)
    return values**2 / max(exact.shape)


def check_values(found, wanted, exact):
    """Eigenvalues: NaN if the matrix is not finite, and infinite where float32 ends."""
    found = np.asarray(found, np.float64)
    if not np.isfinite(exact).all():
        assert np.isnan(found).any()
        return
    top = wanted.max(initial=0)
    if top > HIGHEST / 10:
        assert np.isinf(found[0]) or found[0] > HIGHEST / 100
        return
    # Squares under the smallest number are 0.
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5 * top + LOWEST)


def check_near(found, wanted, exact, eps):
    """A matrix near another, beside the norm of the one that was given."""
    found, norm = np.asarray(found, np.float64), np.linalg.norm(exact)
    if not np.isfinite(exact).all():
        assert not np.isfinite(found).all()
        return
    assert np.isfinite(found).all()
    far = np.linalg.norm(found - wanted)
    # Values that are nearly equal may turn into one another: compare what is left.
    rest = abs(np.linalg.norm(exact - found) - np.linalg.norm(exact - wanted))
    assert min(far, rest) <= (1e-4 + 4 * eps) * norm, (far, rest, norm)


def blocks(exact, ratio):
    """Blocks of an aspect ratio, spread evenly along the side that they divide."""
    turned = exact if exact.shape[0] <= exact.shape[1] else exact.T
    short, long = turned.shape
    width = round(short / ratio)
    if width > long:  # nearer to square than the blocks
        turned, width = turned.T, max(1, round(long * ratio))
    count = -(-turned.shape[1] // width)
    room = turned.shape[1] - width
    starts = [round(index * room / max(count - 1, 1)) for index in range(count)]
    return [turned[:, start : start + width] for start in starts]


def check_metrics(found, spectrum, exact):
    """Norms and ranks against singular values, and the exponent by its formula."""
    values = np.asarray(spectrum.eigenvalues, np.float64)
    if not np.isfinite(values).all():
        counts = ("numerical_rank", "alpha_tail", "hill_tail")
        rest = [np.isnan(n) for name, n in found._asdict().items() if name not in counts]
        assert all(rest)
        return
    s = np.sqrt(np.maximum(values, 0) * max(exact.shape))
    total = np.sum(s**2)
    if not values[0] > LOWEST or total > HIGHEST:
        return
    close = lambda name, wanted: np.testing.assert_allclose(
        float(getattr(found, name)), wanted, rtol=1e-3, err_msg=name
    )
    close("spectral_norm", s[0])
    close("frobenius_norm", np.sqrt(total))
    close("stable_rank", total / s[0] ** 2)
    q = s[s > 0] / s.sum()
    close("effective_rank", np.exp(-np.sum(q * np.log(q))))
    tail = int(found.alpha_tail)
    if tail > 1:
        logs = np.log(values[:tail] / values[tail - 1])
        if logs.sum() > 1e-3:
            close("alpha", 1 + tail / logs.sum())


def check_ranks(spectrum):
    """Counts of all rules are in range, and those of the simple ones are right."""
    values = np.asarray(spectrum.eigenvalues, np.float64)
    for rule in RULES:
        fit = rule.fit(spectrum)
        rank = int(rule(spectrum, fit))
        assert 0 <= rank <= values.size, (rule, rank)
        accepted = bool(rule.accepts(spectrum, fit))
        assert np.isfinite(values).all() or not accepted, rule
        if not np.isfinite(values).all() or values.sum() > HIGHEST:
            continue
        if isinstance(rule, rmtjax.ranks.energy) and values.sum() > LOWEST:
            held = np.cumsum(values) / values.sum()
            near = np.abs(held - rule.share) < 1e-5
            count = int(np.sum(held < rule.share)) + 1
            assert rank == count or near.any(), (rank, count)
        if isinstance(rule, rmtjax.ranks.fixed):
            assert rank == min(3, values.size)
        if rule.needs_noise and not np.isnan(fit.threshold):
            assert rank == np.sum(np.asarray(spectrum.eigenvalues) > np.asarray(fit.threshold))


def check_scales(even, exact, sides):
    """The matrix is what its scales give back; where noise has none, none are found."""
    if not np.isfinite(exact).all():
        assert not bool(even.converged)
        return
    rows, columns = (np.asarray(scale, np.float64) for scale in (even.rows, even.columns))
    for scale in (rows, columns):
        assert np.isfinite(scale).all()
        assert (scale > 0).all()
    back = np.asarray(even.matrix, np.float64) * rows[:, None] * columns
    np.testing.assert_allclose(back, exact, rtol=1e-5, atol=LOWEST)
    np.testing.assert_allclose(np.mean(rows**2), np.mean(columns**2), rtol=1e-3)
    live = (exact != 0).all()
    if sides == "rows":
        np.testing.assert_allclose(columns, columns[0], rtol=1e-3)
    if sides == "columns":
        np.testing.assert_allclose(rows, rows[0], rtol=1e-3)
    if bool(even.converged) and live and min(exact.shape) >= 50:
        check_dyson(np.asarray(even.matrix, np.float64), sides)


def check_dyson(matrix, sides):
    """After equalizing, the equations of Dyson ask for no other scales."""
    eta = np.median(np.linalg.svd(matrix, compute_uv=False))
    if not eta > 1e-3 * np.linalg.norm(matrix, 2):  # of low rank: there is no noise
        return
    m, n = matrix.shape
    g = eta * np.diag(np.linalg.inv(matrix @ matrix.T + eta**2 * np.eye(m)))
    h = eta * np.diag(np.linalg.inv(matrix.T @ matrix + eta**2 * np.eye(n)))
    x = (1 / g - eta) / np.sqrt(m - eta * g.sum())
    y = (1 / h - eta) / np.sqrt(n - eta * h.sum())
    for side, variances in (("rows", x), ("columns", y)):
        if sides in ("both", side):
            np.testing.assert_allclose(variances / variances.mean(), 1, atol=0.02, err_msg=side)


def check_traps(traps, exact):
    """Spikes are eigenvalues, largest first; entries are those that are far from the mean."""
    if not np.isfinite(exact).all():
        assert not traps.spikes
        assert not any(traps.shuffled)
        assert not traps.largest
        return
    values = eigenvalues_of(exact)
    found = [spike.eigenvalue for spike in traps.spikes]
    top = values.max(initial=0)
    np.testing.assert_allclose(found, values[: len(found)], rtol=1e-3, atol=1e-5 * top)
    for spike in (*traps.spikes, *(one for draw in traps.shuffled for one in draw)):
        assert np.isfinite([spike.eigenvalue, spike.left_participation]).all()
        assert 0 <= spike.row < exact.shape[0]
        assert 0 <= spike.column < exact.shape[1]
    assert len(traps.shuffled) == 2
    deviation = exact.std()
    for entry in traps.largest:
        wanted = (exact[entry.row, entry.column] - exact.mean()) / (deviation or 1)
        np.testing.assert_allclose(entry.deviations, wanted, rtol=1e-3, atol=1e-6)


def check_tails(total, moved, exact, rank, eps):
    """The sum of the last singular values, and the matrix with these made smaller."""
    if not np.isfinite(exact).all():
        assert np.isnan(total)
        assert np.isnan(np.asarray(moved)).any()
        return
    u, s, vt = np.linalg.svd(exact, full_matrices=False)
    np.testing.assert_allclose(
        float(total), s[rank:].sum(), rtol=1e-3, atol=1e-5 * s.sum() + LOWEST
    )
    less = np.where(np.arange(s.size) < rank, s, np.maximum(s - 0.5, 0))
    check_near(moved, (u * less) @ vt, exact, eps)


def check_train(fit, exact, eps, tolerance):
    """A train loses what it says, and no more than it may."""
    found = np.asarray(fit.train.multiply(), np.float64)
    if not np.isfinite(exact).all():
        assert np.isnan(found).any()
        return
    norm = np.linalg.norm(exact)
    room = (1e-4 + 8 * eps) * norm
    lost = np.linalg.norm(found - exact)
    assert lost <= fit.error * 1.001 + room, (lost, fit.error, norm)
    assert fit.error <= tolerance * norm * 1.001 + room, (fit.error, norm)


def check_entropies(spectra, entropies):
    for s, entropy in zip(spectra, np.atleast_1d(entropies), strict=True):
        s = np.asarray(s, np.float64)
        shares = (s / (s.max() or 1)) ** 2
        shares = shares[shares > 0] / (shares.sum() or 1)
        wanted = -np.sum(shares * np.log(shares))
        np.testing.assert_allclose(float(entropy), wanted, atol=1e-3)


def check_grid(grid, rounded, exact, bits, eps):
    """Codes are of the grid, the nearest for their scale, which is the best for the codes."""
    codes, scale = (np.asarray(part, np.float64) for part in grid)
    if not np.isfinite(exact).all():
        assert np.isnan(np.asarray(rounded, np.float64)).any()
        return
    levels = {1: [1], 3: [0, 1, 2, 3], (0, 1, 2, 4): [0, 1, 2, 4]}[bits]
    assert np.isin(np.abs(codes), levels).all()
    product = codes * scale
    peak = np.abs(exact).max(initial=0)
    np.testing.assert_allclose(
        np.asarray(rounded, np.float64), product, rtol=1e-5 + eps, atol=1e-5 * peak
    )
    # Better than one code for all, and than zero.
    lost = np.linalg.norm(exact - product)
    assert lost <= np.linalg.norm(exact) * (1 + 1e-5), (lost, np.linalg.norm(exact))
    if peak > 0 and len(levels) > 1:
        coarse = np.sign(exact) * np.round(np.abs(exact) / peak) * peak
        assert lost <= np.linalg.norm(exact - coarse) * (1 + 1e-4)


def check_order(found, exact):
    """An order of the inputs, and the magnitudes that 2 of each 4 keep in it."""
    assert sorted(found.order.tolist()) == list(range(len(exact)))

    def kept(matrix):
        groups = np.sort(np.abs(matrix).reshape(-1, 4, matrix.shape[1]), axis=1)
        return groups[:, 2:].sum()

    np.testing.assert_allclose(found.before, kept(exact), rtol=1e-6)
    np.testing.assert_allclose(found.after, kept(exact[found.order]), rtol=1e-6)
    assert found.after >= found.before * (1 - 1e-9)
