"""The command line: what it prints and what it writes, whole or not at all."""

import csv
import io
import json
import os
import signal
import stat
import sys
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cli_models import names_of, save, save_model, spiked, usage_error

import rmtjax
from rmtjax import checkpoint, cli
from rmtjax.moments import Moments
from rmtjax.moments._moment import sums_of_rows


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path)


def test_analyze_prints_the_table_and_writes_what_is_asked_for(tmp_path, model, capsys):
    files = {form: tmp_path / f"report.{form}" for form in ("json", "csv", "html")}
    options = [word for form, path in files.items() for word in (f"--{form}", str(path))]
    assert cli.main(["analyze", model, "--level", "0.05", *options]) == 0
    shown = capsys.readouterr()
    report = checkpoint.analyze_file(model, rule=rmtjax.ranks.bema(level=0.05))
    columns = shown.out.splitlines()[0].split()
    assert shown.out == f"{report.table(*columns)}\n\n{report.summary}\n"
    assert {"path", "spikes", "removed", "reason"} <= {*columns}
    assert shown.err == ""  # no progress where no terminal is
    assert json.loads(files["json"].read_text())["rows"] == report.to_dict()["rows"]
    rows = files["csv"].read_text().splitlines()
    assert [row["path"] for row in csv.DictReader(rows)] == ["a.weight", "b.weight"]
    page = files["html"].read_text()
    assert page.startswith("<!doctype html>")
    assert page == report.to_page(f"rmtjax analyze {model}")
    assert cli.main(["analyze", model, "--quiet"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("mode", ["factorize", "truncate"])
def test_compress_writes_a_file_and_says_what_it_did(tmp_path, model, capsys, mode):
    out = str(tmp_path / "out.safetensors")
    argv = ["compress", model, "--out", out, "--rule", "fixed:16", "--mode", mode]
    assert cli.main([*argv, "--exclude", "re:^b", "--dtype", "float64", "--device", "cpu"]) == 0
    table, _, last = capsys.readouterr().out.rstrip().rpartition("\n")
    assert f"{mode}d: rank 16 of 60, as asked by the rule" in table
    assert "b.weight" not in table
    assert f" -> {out}, " in last
    halves = {"a.weight/left", "a.weight/right"}
    expected = halves if mode == "factorize" else {"a.weight"}
    assert names_of(out) == {"b.weight", "b.bias"} | expected
    assert np.dtype(float) != rmtjax.spectrum(np.ones((2, 2))).eigenvalues.dtype  # 64 bits are off


def test_an_output_is_replaced_by_force_only(tmp_path, model, capsys):
    out = tmp_path / "out.safetensors"
    out.write_text("precious")
    argv = ["compress", model, "--out", str(out), "--rule", "fixed:16", "--quiet"]
    assert cli.main(argv) == 1
    assert "--force" in capsys.readouterr().err
    assert out.read_text() == "precious"
    assert cli.main([*argv, "--force"]) == 0
    assert "a.weight/left" in names_of(out)
    assert cli.main(["compress", model, "--out", model, "--force"]) == 1
    assert "must not be the input" in capsys.readouterr().err
    assert "a.weight" in names_of(model)


def test_a_report_goes_into_a_pipe_through_a_link_and_to_stdout(tmp_path, model, capsys):
    pipe, real, link = (tmp_path / name for name in ("pipe", "real", "link"))
    os.mkfifo(pipe)
    link.symlink_to(real)
    real.write_text("old")
    real.chmod(0o640)
    got = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    argv = ["analyze", model, "--json", str(pipe), "--csv", str(link), "--html", "-"]
    assert cli.main(argv) == 0
    reader.join()
    assert [row["path"] for row in json.loads(got[0])["rows"]] == ["a.weight", "b.weight"]
    assert stat.S_ISFIFO(pipe.lstat().st_mode)
    assert link.is_symlink()
    assert real.read_text().startswith("path,shape,")
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    shown = capsys.readouterr().out  # no table
    assert shown.startswith("<!doctype html>")
    assert shown.endswith("</html>\n")
    assert "named twice" in usage_error(capsys, *argv[:3], "-", "--csv", "-")


def test_an_output_is_no_pipe_and_a_link_is_followed(tmp_path, model, capsys):
    pipe, real, link = (tmp_path / name for name in ("pipe", "real", "link.safetensors"))
    os.mkfifo(pipe)
    link.symlink_to(real)
    argv = ["compress", model, "--rule", "fixed:16", "--quiet", "--force", "--out"]
    assert cli.main([*argv, str(pipe)]) == 1
    assert "is not a regular file: give the path of a file" in capsys.readouterr().err
    assert stat.S_ISFIFO(pipe.lstat().st_mode)
    assert cli.main([*argv, str(link)]) == 0
    assert link.is_symlink()
    assert "a.weight/left" in names_of(real)


def test_analyze_tells_ranks_as_they_are_or_rounded_up_as_compress_does(tmp_path, model, capsys):
    def shown(*argv):
        assert cli.main([*argv]) == 0
        return capsys.readouterr().out

    planned = shown("analyze", model)
    assert planned.count("would be factorized: 1 of 60 are signal, rank 1\n") == 2
    assert "2 would be factorized" in planned
    rounded = shown("analyze", model, "--multiple", "8").partition("\n\n")[0]
    assert rounded.count("1 of 60 are signal, rank 8") == 2
    done = shown("compress", model, "--out", str(tmp_path / "out.safetensors"))
    assert done.startswith(rounded.replace("would be factorized", "factorized"))


def test_a_narrow_terminal_leaves_columns_out(model, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert cli.main(["analyze", model]) == 0
    table = capsys.readouterr().out.partition("\n\n")[0]
    assert max(map(len, table.splitlines())) <= 60
    head = table.splitlines()[0].split()
    assert (head[0], head[-1]) == ("path", "reason")
    assert "spikes" in head
    assert "variance" not in head


@pytest.mark.parametrize("command", ["analyze", "compress"])
def test_equal_kernels_are_timed_once(tmp_path, model, command):
    table = tmp_path / "rows.json"
    out = ["--out", str(tmp_path / "out.safetensors")] if command == "compress" else []
    argv = [command, model, *out, "--rule", "fixed:16", "--batch", "7", "--quiet"]
    assert cli.main([*argv, "--json", str(table)]) == 0
    first, second = json.loads(table.read_text())["rows"]
    # Two measurements would differ in the last digits.
    assert first["milliseconds"] == second["milliseconds"] > 0
    assert first["milliseconds_after"] == second["milliseconds_after"]


def test_a_name_in_full_makes_a_kernel_of_any_tensor(tmp_path, capsys):
    path = save(tmp_path, projection=spiked(0), mask=spiked(1))
    assert cli.main(["analyze", path, "--include", "projection"]) == 0
    table, _, words = capsys.readouterr().out.partition("\n\n")
    assert [line.split()[0] for line in table.splitlines()] == ["path", "projection"]
    assert words.startswith("Analyzed: 1 kernel with ")


def test_a_name_in_full_may_have_brackets(tmp_path, capsys):
    path = save(tmp_path, **{"layers[0].weight": spiked(0), "layers[1].weight": spiked(1)})
    assert cli.main(["analyze", path, "--include", "layers[0].weight"]) == 0
    table = capsys.readouterr().out.partition("\n\n")[0]
    assert [line.split()[0] for line in table.splitlines()] == ["path", "layers[0].weight"]


def test_hostile_names_steer_neither_the_terminal_nor_the_page(tmp_path, capsys):
    hostile = {"\x1b[2J\n<script>x</script>.weight": spiked(0), "../../{0}.weight": spiked(1)}
    page = tmp_path / "page.html"
    assert cli.main(["analyze", save(tmp_path, **hostile), "--html", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert len(shown.partition("\n\n")[0].splitlines()) == 3
    assert "<script>x" not in page.read_text()


class Terminal(io.StringIO):
    """A terminal on which the work is at a place when the name of the place is shown."""

    def __init__(self, place="", act=None):
        super().__init__()
        self.place, self.act = place, act

    def isatty(self):
        return True

    def write(self, text):
        if self.act and self.place in text:
            self.act()
        return super().write(text)


@pytest.fixture
def plain(monkeypatch):
    """Shows the progress without rich, on a terminal that the test gives."""
    monkeypatch.setitem(sys.modules, "rich.console", None)
    return lambda terminal: monkeypatch.setattr(sys, "stderr", terminal)


@pytest.mark.parametrize("rich", [True, False])
def test_progress_is_shown_on_a_terminal(monkeypatch, model, capsys, rich):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    assert cli.main(["analyze", model]) == 0
    assert ("kernels" if rich else "[2/2] b.weight") in terminal.getvalue()
    assert "a.weight" in capsys.readouterr().out


# The last leaf of three, when one factor is already written.
WRITES = "[5/5] b.weight"


@pytest.fixture
def hears_interrupts():
    """Takes SIGINT as at a terminal: a shell starts what it runs in the background deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("hears_interrupts")
def test_an_interrupt_leaves_no_half_written_file(tmp_path, plain, model):
    terminal = Terminal(WRITES, lambda: signal.raise_signal(signal.SIGINT))
    plain(terminal)
    argv = ["compress", model, "--out", str(tmp_path / "out.safetensors"), "--rule", "fixed:16"]
    assert cli.main(argv) == 130
    assert terminal.getvalue().endswith("rmtjax: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_an_end_leaves_no_half_written_file(tmp_path, plain, model, name, code):
    number, out = getattr(signal, name), tmp_path / "out.safetensors"

    def end():
        assert len([*tmp_path.iterdir()]) == 2  # the write has begun
        os.kill(os.getpid(), number)

    terminal = Terminal(WRITES, end)
    plain(terminal)
    before = signal.signal(number, signal.SIG_DFL)
    try:
        argv = ["compress", model, "--out", str(out), "--rule", "fixed:16", "--force"]
        assert cli.main(argv) == code
        assert terminal.getvalue().endswith(f"rmtjax: ended by {name}\n")
        assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
        assert signal.getsignal(number) == signal.SIG_DFL
        # Under nohup the signal is ignored, and stays so.
        signal.signal(number, signal.SIG_IGN)
        assert cli.main(argv) == 0
        assert "b.weight/left" in names_of(out)
    finally:
        signal.signal(number, before)


def test_moments_and_a_budget_shape_the_plan(tmp_path, capsys):
    rng = np.random.default_rng(0)
    params = {"a": {"kernel": rng.normal(size=(80, 60)).astype(np.float32)}}
    rows = (rng.normal(size=(1, 300, 80)) * 0.9 ** np.arange(80)).astype(np.float32)
    moments = Moments(
        {"a/kernel": sums_of_rows(jnp.asarray(rows))}, {}, (("a/kernel", "a/kernel"),)
    )
    names = [str(tmp_path / f"{name}.safetensors") for name in ("model", "moments", "out")]
    checkpoint.save(names[0], params)
    checkpoint.save_moments(names[1], moments)
    argv = ["compress", names[0], "--out", names[2], "--budget", "0.5"]
    assert cli.main([*argv, "--moments", names[1]]) == 0
    shown = capsys.readouterr().out
    assert "removed_outputs" in shown
    assert "rank 16 of 60 under the budget by output" in shown
    plan = rmtjax.plan(params, moments=moments, budget=0.5)
    expected = rmtjax.factorize(params, plan, moments=moments)["a"]["kernel"]
    found = checkpoint.restore(names[2])["a"]["kernel"]
    np.testing.assert_allclose(found.left @ found.right, expected.left @ expected.right, atol=1e-4)
    assert cli.main([*argv, "--force"]) == 0
    assert "removed_outputs" not in capsys.readouterr().out
    assert "--budget: must be a share" in usage_error(capsys, *argv[:-1], "1.5", "--force")
    assert cli.main(["analyze", names[1], "--moments", names[0]]) == 1
    assert "holds no moments" in capsys.readouterr().err
