"""The kernels with most signal: of noise there are none, and of each kind the strongest."""

import json

import jax
import numpy as np
import optax
import pytest

import rmtjax
from rmtjax import checkpoint, ranks
from rmtjax.cli import main
from rmtjax.report import Row


@pytest.fixture(scope="module")
def params():
    """Four layers of two kinds: the later, the stronger its signal; the last kind is noise."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((8, 100, 60)).astype(np.float32)
    signal = np.outer(rng.standard_normal(100), rng.standard_normal(60)).astype(np.float32)
    layers = {
        f"layers_{index}": {
            "query": {"kernel": noise[index] + 0.4 * index * signal},
            "out": {"kernel": 5 * noise[4 + index]},
        }
        for index in range(4)
    }
    return layers


def test_of_each_kind_the_strongest_and_of_noise_none(params):
    report = rmtjax.analyze(params)
    query = lambda *layers: tuple(f"layers_{index}/query/kernel" for index in layers)
    assert rmtjax.most_signal(report, 0.25) == query(3)
    assert rmtjax.most_signal(report, 0.5) == query(2, 3)
    # All have signal but the first, and noise stays out though there is room for it.
    assert rmtjax.most_signal(report, 1.0) == query(1, 2, 3)
    assert rmtjax.most_signal(report, 0.25, by_kind=False) == query(2, 3)


def test_noise_gives_no_kernel():
    noise = jax.random.normal(jax.random.key(10), (30, 60, 80))
    report = rmtjax.analyze({f"layer_{i}": {"kernel": kernel} for i, kernel in enumerate(noise)})
    # One of them is above its own level, and not above that of the list.
    assert sum(row.spikes for row in report) == 1
    assert rmtjax.most_signal(report, 1.0) == ()


class Own:
    """A rule of a user, with a level that is none of ours."""

    level, needs_noise, accepts = 0.01, True, ranks.bema().accepts
    fit, __call__ = staticmethod(ranks.bema().fit), lambda self, *args: ranks.bema()(*args)


def test_a_rule_of_a_user_keeps_its_own_level(params):
    chosen = [
        rmtjax.most_signal(rmtjax.analyze(params, rule=r), 1.0) for r in (Own(), ranks.bema())
    ]
    assert chosen[0] == chosen[1] != ()


def test_a_mask_trains_what_was_chosen_alone(params):
    chosen = rmtjax.most_signal(rmtjax.analyze(params))
    mask = rmtjax.mask(params, chosen)
    frozen = optax.masked(optax.set_to_zero(), jax.tree.map(lambda chosen: not chosen, mask))
    updates, _ = frozen.update(params, frozen.init(params))
    moved = jax.tree.map(lambda update: bool(np.any(update)), updates)
    assert moved == mask
    assert sum(jax.tree.leaves(mask)) == 1


def test_faults_are_told(params):
    report = rmtjax.analyze(params)
    for top in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"`top` must be in \(0, 1\].*got {top}"):
            rmtjax.most_signal(report, top)
    with pytest.raises(ValueError, match="`paths` has 'nothing', which is not in the tree"):
        rmtjax.mask(params, ["nothing"])
    with pytest.raises(TypeError, match="`paths` must be several paths, got the text 'a/kernel'"):
        rmtjax.mask(params, "a/kernel")


@pytest.mark.parametrize("form", ["names", "json", "axolotl"])
def test_the_command_line_prints_a_list_that_programs_read(params, form, tmp_path, capsys):
    path = str(tmp_path / "model.safetensors")
    checkpoint.save(path, params)
    assert main(["select", path, "--top", "50%", "--form", form]) == 0
    printed = capsys.readouterr().out
    names = ["layers_2/query/kernel", "layers_3/query/kernel"]
    expected = {
        "names": "\n".join(names) + "\n",
        "json": json.dumps(names, indent=2) + "\n",
        "axolotl": "unfrozen_parameters:\n" + "".join(f'- "^{name}$"\n' for name in names),
    }
    assert printed == expected[form]


def test_the_list_is_quiet_and_is_alone_on_stdout(params, tmp_path, capsys):
    path = str(tmp_path / "model.safetensors")
    checkpoint.save(path, {"a": {"kernel": params["layers_3"]["query"]["kernel"]}})
    assert main(["select", path, "--quiet"]) == 0
    assert capsys.readouterr().out == "a/kernel\n"
    with pytest.raises(SystemExit, match="2"):
        main(["select", path, "--csv", "-"])
    assert "stdout is for the list" in capsys.readouterr().err
    # Of noise no list is printed: an empty one unfreezes all.
    checkpoint.save(path, {"a": params["layers_0"]["out"]})
    assert main(["select", path, "--form", "axolotl"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "has signal" in shown.err


def test_a_share_is_rounded_up_of_what_it_means():
    few = rmtjax.Report(rmtjax.Plan())
    paths = [f"layer_{index}" for index in range(100)]
    # Where the report caches them.
    vars(few)["rows"] = [Row(path, (80, 60), "keep", "", spikes=1) for path in paths]
    vars(few)["metrics"] = {path: {"snr": 1.0} for path in paths}
    # As binary numbers, 0.07 * 100 is above 7.
    chosen = {top: len(rmtjax.most_signal(few, top)) for top in (0.07, 0.071, 1e-12)}
    assert chosen == {0.07: 7, 0.071: 8, 1e-12: 1}


def test_a_share_out_of_range_is_wrong_usage(capsys):
    for top in ("0%", "150%", "many"):
        with pytest.raises(SystemExit, match="2"):
            main(["select", "model.safetensors", "--top", top])
        assert "--top: must be a share" in capsys.readouterr().err
