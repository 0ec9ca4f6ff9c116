"""Changes of replicas with known parts, and what they agree on by NumPy in float64."""

import numpy as np

EPS = float(np.finfo(np.float32).eps)


def agreed(changes, rounding=128 * EPS):
    """The agreed change of (k, m, n), and the effective rank, by decompositions in float64."""
    changes = np.asarray(changes, np.float64)
    count, kept, ranks = len(changes), 0.0, []
    for index, change in enumerate(changes):
        u, s, vt = np.linalg.svd(np.delete(changes, index, 0).mean(axis=0), full_matrices=False)
        r = np.maximum(np.einsum("nm,nk,mk->m", u, change, vt), 0) * (s > rounding * s[0])
        kept = kept + (u * r) @ vt / count
        share = r[r > 0] / r.sum() if r.sum() else np.ones(0)
        ranks.append(np.exp(-np.sum(share * np.log(share))) if len(share) else 0.0)
    return kept, float(np.mean(ranks))


def noisy(count, shape, *, signal=1.0, rank=3, seed=0, dtype: type = np.float32):
    """Unit noise of its own for each replica, and directions that all have in common.

    The weakest is `signal` times the edge of one replica's noise.
    """
    rng = np.random.default_rng(seed)
    *batch, rows, columns = shape
    u, v = (np.linalg.qr(rng.normal(size=(*batch, side, rank)))[0] for side in (rows, columns))
    values = signal * (np.sqrt(rows) + np.sqrt(columns)) * np.arange(rank, 0, -1)
    common = (u * values) @ np.swapaxes(v, -1, -2)
    return (rng.normal(size=(count, *shape)) + common).astype(dtype)


def relative(found, wanted):
    """The distance of two arrays over the norm of the second."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
