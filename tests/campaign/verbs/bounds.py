"""Certificates of one matrix: bounds that must hold in float64."""

import jax
import numpy as np

import rmtjax
from campaign.oracle import lowered

INPUTS = np.random.default_rng(0).normal(size=(7, 100)).astype(np.float32)
LAST = np.random.default_rng(1).normal(size=(100, 5)).astype(np.float32)


def check_norm(leaf, exact):
    """The operator norm is an upper bound, and a close one."""
    found = float(rmtjax.certificate.operator_norm(leaf))
    if not np.isfinite(exact).all():
        assert np.isnan(found)
        return
    wanted = np.linalg.norm(exact, 2)
    assert wanted <= found <= wanted * (1 + 1e-3), (wanted, found)


def half_of(leaf, exact):
    """A kernel with fewer entries, of the same type, and its values."""
    changed = np.asarray(leaf).copy()
    changed[np.abs(exact) < (np.median(np.abs(exact)) if exact.size else 0)] = 0
    return changed, changed.astype(exact.dtype)


def check_path(leaf, exact):
    """A bound on the logits is no less than their change, and one on the penalty no more."""
    changed, new = half_of(leaf, exact)
    inputs = INPUTS[:, : exact.shape[0]]
    found = rmtjax.certificate.data_path(leaf, changed, inputs, l1=0.1, l2=0.01)
    if not np.isfinite(exact).all():
        assert not bool(found.lowers)
        assert not np.isfinite(found.shift).any() or np.isinf(exact).any()
        assert not np.isfinite(found.loss)
        return
    shift = np.abs(inputs.astype(np.float64) @ (exact - new)).max(axis=1)
    bound = np.asarray(found.shift, np.float64)
    assert (shift <= bound).all()
    assert np.isfinite(bound).all()
    magnitudes = rmtjax.certificate.data_path(leaf, changed, inputs, l1=1.0).penalty
    assert -np.inf < float(magnitudes) <= (np.abs(exact) - np.abs(new)).sum()
    lost = 0.1 * (np.abs(exact) - np.abs(new)).sum() + 0.01 * (exact**2 - new**2).sum()
    assert float(found.penalty) <= lost or not np.isfinite(float(found.penalty))
    assert 2 * shift.mean() <= float(found.loss)
    if bool(found.lowers):
        assert 2 * shift.mean() < lost


def check_chain(leaf, exact):
    """Two layers, the first of them cut: no logit moves further than the bound."""
    rank, finite = max(1, min(exact.shape) // 2), np.isfinite(exact).all()
    able = finite and exact.ndim == 2 and exact.size and exact.dtype.kind == "f"
    changed = lowered(exact, rank).astype(np.float32) if able else np.asarray(leaf)
    last, inputs = LAST[: exact.shape[-1]], INPUTS[:, : exact.shape[0]]
    trees = [{"a": {"kernel": kernel}, "b": {"kernel": last}} for kernel in (leaf, changed)]
    labels = np.arange(7) % 5
    found = rmtjax.certificate.certify(*trees, inputs, layers=["a", "b"], labels=labels)
    if not finite:
        assert not np.asarray(found.unchanged).any()
        assert not np.isfinite(found.loss)
        return
    run = lambda kernel: np.maximum(inputs.astype(np.float64) @ kernel, 0) @ last
    before, after = run(exact), run(changed.astype(np.float64))
    bound = np.asarray(found.change, np.float64)
    assert (np.abs(before - after) <= bound).all()
    sure = np.asarray(found.unchanged)
    assert (before.argmax(axis=1) == after.argmax(axis=1))[sure].all()
    log_p = lambda logits: np.asarray(jax.nn.log_softmax(logits))[np.arange(7), labels]
    rise = log_p(before).mean() - log_p(after).mean()
    assert rise <= float(found.loss) + 1e-5 * np.abs(log_p(before)).max()
    lost = (exact**2).sum() - (changed.astype(np.float64) ** 2).sum()
    # A value that is not finite is no bound.
    assert not np.isfinite(found.removed) or float(found.removed) <= lost
