"""The command line where it fails: wrong usage, what it then says, and its exit code."""

import json
import os
import subprocess
import sys

import pytest
from helpers.cli_models import names_of, save_model, usage_error

from rmtjax import cli


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--rule", "beam"],
            "--rule must be bema, gavish_donoho, energy:SHARE, fixed:RANK or size",
        ),
        (["--rule", "energy"], "--rule must be"),
        (["--rule", "bema:3"], "--rule must be"),
        (["--rule", "fixed:many"], "--rule fixed:many"),
        (["--rule", "size:1"], "`share` must be in (0, 1), such as 0.5, got 1.0"),
        (["--rule", "energy:1.5"], "`share` must be in"),
        (["--rule", "fixed:16", "--level", "0.1"], "options of the rule bema"),
        (["--rule", "size:0.5", "--budget", "0.5"], "`rule` must be left out with `budget`"),
        (["--level", "2"], "`level` must be in"),
        (["--keep", "2"], "`keep` must be in"),
        (["--min-size", "0"], "`min_size` must be"),
        (["--include", "re:("], "not a regular expression"),
        (["--device", "abacus"], "--device abacus"),
        (["--dtype", "float16"], "invalid choice"),
        (["--json", "out.safetensors"], "is named twice"),
    ],
)
def test_wrong_usage_is_told_before_the_work(tmp_path, monkeypatch, model, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    assert message in usage_error(capsys, "compress", model, "--out", "out.safetensors", *argv)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("compress", ["--bugdet", "0.75"], "no option --bugdet: did you mean --budget?"),
        ("compress", ["--out=o.safetensors", "--bugdet=1"], "did you mean --budget?"),
        ("analyze", ["--colunms", "hill"], "did you mean --columns?"),
        ("select", ["--zzzz"], "rmtjax select has no option --zzzz. See rmtjax select --help"),
        ("analyze", ["second"], "unrecognized arguments: second"),
        ("compress", ["--budget", "75", "--out", "o.safetensors"], "got '75': 75 % is 0.75"),
        ("select", ["--top", "1.5"], "got '1.5': that is more than the whole"),
        ("select", ["--top", "300%"], "got '300%': that is more than the whole"),
        # Found after the words were read.
        ("analyze", ["--rule", "beam"], "--rule must be"),
        ("compress", [], "the following arguments are required: --out"),
    ],
)
def test_wrong_usage_is_one_line_that_names_the_help_of_the_command(
    capsys, command, words, message
):
    shown = usage_error(capsys, command, "f.safetensors", *words)
    assert shown.startswith(f"rmtjax {command}: error: ")
    assert shown.endswith(f" See rmtjax {command} --help.\n")
    assert shown.count("\n") == 1
    assert message in shown


@pytest.mark.parametrize("argv", [[], ["shrink"]])
def test_a_missing_command_is_wrong_usage(capsys, argv):
    shown = usage_error(capsys, *argv)
    assert shown.endswith(" See rmtjax --help.\n")
    assert shown.count("\n") == 1


@pytest.mark.parametrize(("argv", "shown"), [("--help", "exit codes:"), ("--version", "rmtjax ")])
def test_help_and_version(capsys, argv, shown):
    for words in ([argv], ["compress", argv])[: 1 + (argv == "--help")]:
        with pytest.raises(SystemExit) as stopped:
            cli.main(words)
        assert stopped.value.code == 0
        assert shown in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["analyze", "missing"], "rmtjax: there is nothing at 'missing': give a path"),
        (["analyze", "model.safetensors", "--include", "c.*"], "'c.*' matches no tensor, of 3"),
        (
            ["analyze", "model.safetensors", "--include", "weight"],
            ", 'b.bias'. A glob must match the complete name, and '*' stands for anything: "
            "'*weight*' finds",
        ),
        (["compress", "model.safetensors", "--out", "out"], "give 'out.safetensors'"),
        (["analyze", "model.safetensors", "--include", "*.bias"], "no tensor is chosen"),
        (["analyze", "damaged"], "cannot read 'damaged'"),
        (
            ["analyze", "model.safetensors", "--moments", "damaged"],
            "--moments must be a file of `rmtjax moments`: cannot read 'damaged'",
        ),
        (["compress", "model.safetensors", "--out", "nowhere/out"], "is not a folder"),
        (["compress", "model.safetensors", "--out", "damaged/out"], "is not a folder"),
    ],
)
def test_a_failure_is_one_line_and_leaves_nothing(
    tmp_path, monkeypatch, model, capsys, argv, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged").write_bytes(b"\xff" * 100)
    assert cli.main(argv) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("rmtjax: ")
    assert shown.err.count("\n") == 1
    assert message in shown.err
    assert {path.name for path in tmp_path.iterdir()} == {"damaged", "model.safetensors"}


@pytest.mark.parametrize("form", ["json", "csv", "html"])
def test_a_report_is_no_file_that_is_read(tmp_path, model, capsys, form):
    folder = tmp_path / "folder"
    folder.mkdir()
    shard = folder / "a.safetensors"
    os.rename(model, shard)
    index = folder / "model.safetensors.index.json"
    names = dict.fromkeys(("a.weight", "b.weight", "b.bias"), shard.name)
    index.write_text(json.dumps({"weight_map": names}))
    for source, target in ((index, shard), (index, index), (folder, folder / "r"), (shard, shard)):
        assert cli.main(["analyze", str(source), f"--{form}", str(target)]) == 1
        assert f"--{form} must not be the input, nor be in it" in capsys.readouterr().err
    assert {path.name for path in folder.iterdir()} == {shard.name, index.name}
    assert "a.weight" in names_of(shard)


def test_the_module_runs_and_is_quiet_when_its_reader_goes(model):
    command = [sys.executable, "-m", "rmtjax", "analyze", model]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
