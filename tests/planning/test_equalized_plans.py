"""Plans by a rule that equalizes: what is judged, how it is cut, and what a refusal says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cli_models import save, usage_error

import rmtjax
from rmtjax import checkpoint, cli, ranks, shrinkage

RULE = ranks.bema(equalize=True)
STACK = rmtjax.KernelAxes((1,), (2,), (0,))
NOTE = " (rows and columns equalized)"


def planted(seed=1, shape=(80, 120), count=3, sigma=0.7):
    """Signal, and the same with noise whose rows have log-normal scales."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((side, count))).Q for side in shape)
    signal = (left * np.linspace(3, 5, count) * max(shape) ** 0.5) @ right.T
    scales = np.exp(sigma * rng.standard_normal((shape[0], 1)))
    return signal, scales, np.float32(signal + scales * rng.standard_normal(shape))


@pytest.fixture(scope="module")
def params():
    kernel = planted()[2]
    rng = np.random.default_rng(5)
    product = rng.standard_normal((80, 80)) @ rng.standard_normal((80, 120))
    return {
        "kernel": jnp.asarray(kernel),
        "product": jnp.asarray(product, jnp.float32),
        "stack": jnp.asarray(np.stack([kernel, kernel[::-1]])),
    }


OPTIONS = {"where": "*", "axes": {"stack": STACK}, "multiple": 1}


@pytest.fixture(scope="module")
def plan(params):
    return rmtjax.plan(params, rule=RULE, **OPTIONS)


def test_a_plan_judges_the_equalized_kernel(params, plan):
    assert plan["kernel"].reason == f"factorized: 3 of 80 are signal, rank 3{NOTE}"
    assert plan["stack"].reason == f"factorized: 3 of 80 are signal, rank 3{NOTE}"
    assert plan["kernel"].equalized
    even = rmtjax.equalize(params["kernel"])
    expected = rmtjax.spectrum(even.matrix).eigenvalues
    np.testing.assert_allclose(plan["kernel"].spectrum.eigenvalues, expected, rtol=1e-4)
    # A product of matrices has no scales that would make it noise.
    assert plan["product"].action == "keep"
    assert plan.fits == {}


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_cut_is_the_nearest_in_units_of_the_noise(transform, params, plan):
    lower = transform(lambda tree: rmtjax.truncate(tree, plan))(params)
    thin = transform(lambda tree: rmtjax.factorize(tree, plan))(params)
    even = rmtjax.equalize(params["kernel"])
    scales = np.outer(np.asarray(even.rows, np.float64), even.columns)
    u, s, vt = np.linalg.svd(np.asarray(params["kernel"]) / scales, full_matrices=False)
    expected = scales * ((u[:, :3] * s[:3]) @ vt[:3])
    size = np.abs(expected).max()
    merged = rmtjax.merge(thin)
    for tree in (lower, merged):
        # Rounding of float32 in scales of up to 6.
        np.testing.assert_allclose(tree["kernel"], expected, rtol=0, atol=2e-5 * size)
        np.testing.assert_allclose(tree["stack"][0], expected, rtol=0, atol=2e-5 * size)
        np.testing.assert_allclose(tree["stack"][1], expected[::-1], rtol=0, atol=2e-5 * size)
    assert thin["kernel"].left.shape == (80, 3)
    signal, *_ = planted()
    error = lambda kernel: np.sum((np.asarray(kernel) - signal) ** 2)
    # Rows of little noise count for more. The plain truncation cannot know them.
    assert error(lower["kernel"]) < error(rmtjax.truncate_matrix(params["kernel"], 3)) / 2


def test_shrinkage_is_that_of_the_equalized_values(params):
    one = {"kernel": params["kernel"]}
    plan = rmtjax.plan(one, rule=RULE, shrink=shrinkage.frobenius, multiple=1)
    even = rmtjax.equalize(params["kernel"])
    alone = rmtjax.plan({"kernel": even.matrix}, shrink=shrinkage.frobenius, multiple=1)
    expected = rmtjax.truncate({"kernel": even.matrix}, alone)["kernel"]
    expected = expected * even.rows[:, None] * even.columns[None]
    lower = rmtjax.truncate(one, plan)["kernel"]
    np.testing.assert_allclose(lower, expected, rtol=0, atol=1e-4 * float(jnp.abs(expected).max()))


@pytest.mark.slow
def test_a_refusal_says_whether_it_would_fit(params):
    columns = {**params, "columns": params["kernel"].T}
    del columns["stack"]
    rule = ranks.bema(equalize="advise")
    plan = rmtjax.plan(columns, rule=rule, where="*")
    plain = rmtjax.plan(columns, where="*")
    assert plan["kernel"].reason == plain["kernel"].reason + "; fits after equalizing rows"
    assert plan["columns"].reason == plain["columns"].reason + "; fits after equalizing columns"
    nor = "; does not fit after equalizing rows and columns"
    assert plan["product"].reason == plain["product"].reason + nor
    assert not any(row.equalized for row in plan.values())


def test_levels_that_are_given_hold_for_kernels_as_they_are(params):
    one = {"kernel": params["kernel"]}
    fit = rmtjax.fit_bema(rmtjax.spectrum(params["kernel"]))
    given = {"kernel": fit._replace(distance=jnp.float32(0.01))}
    plain = rmtjax.plan(one, fits=given)
    assert rmtjax.plan(one, rule=RULE, fits=given)["kernel"].reason == plain["kernel"].reason


def test_a_report_is_judged_again_by_rules_of_its_kind(params):
    report = rmtjax.analyze({"kernel": params["kernel"]}, rule=RULE)
    again = report.replan(ranks.bema(equalize=True, level=0.1))
    assert again.plan["kernel"].equalized
    assert again.rows[0].spikes == 3
    for old, new in ((report, ranks.bema()), (again, ranks.fixed(3))):
        with pytest.raises(ValueError, match="`rule` must equalize kernels if those of the report"):
            old.replan(new)
    with pytest.raises(ValueError, match="`budget` must be left out with a rule that equalizes"):
        rmtjax.plan(params, rule=RULE, budget=0.5)


def test_files_and_the_command_line(params, tmp_path, capsys):
    out = tmp_path / "thin.safetensors"
    path = save(tmp_path, **{"a.weight": np.asarray(params["kernel"])})
    command = ["compress", path, "--out", str(out), "--equalize", "--multiple", "1"]
    assert cli.main(command) == 0
    assert NOTE in capsys.readouterr().out
    row = checkpoint.load_plan(out)["a.weight"]
    assert row.equalized
    thin = checkpoint.restore(out)["a.weight"]
    one = {"kernel": params["kernel"]}
    lower = rmtjax.truncate(one, rmtjax.plan(one, rule=RULE, multiple=1))["kernel"]
    np.testing.assert_allclose(np.asarray(thin.left @ thin.right), lower, rtol=0, atol=1e-4)
    # Its level holds on no other scale: the kernel stays.
    assert checkpoint.analyze_file(out).rows[0].action == "keep"
    assert cli.main(["analyze", path, "--equalize", "advise", "--columns", "reason"]) == 0
    assert "fits after equalizing" in capsys.readouterr().out
    refused = usage_error(capsys, "analyze", path, "--rule", "fixed:3", "--equalize")
    assert "--equalize are options of the rule bema" in refused
