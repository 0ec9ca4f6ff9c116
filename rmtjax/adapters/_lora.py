"""A low-rank adapter of what a fine-tuning has changed, under the names of the PEFT library."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rmtjax._axes import Factors, MatrixView
from rmtjax._names import is_table
from rmtjax._progress import Progress
from rmtjax._types import Where
from rmtjax.adapters._difference import analyzed, Difference
from rmtjax.checkpoint import (
    check_target,
    FilePath,
    find_leaves,
    open_tensors,
    read_manifest,
    replacing,
    save,
)
from rmtjax.noise import ranks
from rmtjax.planning import changed_leaves, Factorized, PlanOptions

_ENDS = re.compile(r"[./](weight|kernel)$")
# Layers of GPT-2 that store (inputs, outputs), a `Conv1D` each. Its `lm_head` does not.
_TURNED = re.compile(r"(.*\.)?(c_attn|q_attn|c_proj|c_fc)")
# Those of them with more outputs than inputs, whose shape tells which come first.
_WIDER = re.compile(r"(.*\.)?(c_attn|c_fc)")

_FILES = ("adapter_model.safetensors", "adapter_config.json")


def _check_targets(base: FilePath, tuned: FilePath, folder: Path) -> None:
    """Raises ValueError if the adapter would replace a checkpoint, or be in its folder."""
    for path in (base, tuned):
        with open_tensors(path) as tensors:
            for name in _FILES:
                check_target(tensors, folder / name, "`out`")


def _module(path: str) -> str:
    """Returns the name of the module of a kernel, with dots between its parts."""
    return _ENDS.sub("", path).replace("/", ".")


def _inputs_first(leaves: Mapping[str, Any]) -> bool:
    """Tells whether layers of GPT-2 are there that have more outputs than inputs, as columns."""
    wide = [leaf.shape for path, leaf in leaves.items() if _WIDER.fullmatch(_module(path))]
    return any(len(shape) == 2 and shape[1] > shape[0] for shape in wide)


def _pair(path: str, factors: Factors, fan_in_fan_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns A of (rank, inputs) and B of (outputs, rank) of a change B A."""
    left, right = (np.asarray(part) for part in factors)
    # Torch stores (outputs, inputs), and Flax does not.
    if path.endswith("kernel") or (fan_in_fan_out and _TURNED.fullmatch(_module(path))):
        left, right = right.T, left.T
    return right, left


def _halves(
    leaves: Mapping[str, Any], difference: Difference, fan_in_fan_out: bool
) -> tuple[dict[str, np.ndarray], dict[str, int], list[str]]:
    """Returns the tensors of an adapter, the rank of each of its modules, and their paths."""
    tensors, found, written = {}, {}, []
    for path, row in difference.report.plan.changes.items():
        # Of other layers PEFT does not load an adapter by these names.
        linear = _ENDS.search(path) and not is_table(path, row.shape)
        if not isinstance(row, Factorized) or len(row.shape) != 2 or not linear:
            continue
        module = _module(path)
        if module in found:
            raise ValueError(
                f"{path!r} and another kernel would both be {module!r} in the adapter: rename "
                "one of them, or leave it out by `where`."
            )
        view = MatrixView(path, leaves[path], row.axes)
        ((_, factors),) = changed_leaves({path: view}, {path: row})
        pair = _pair(path, jax.device_get(factors), fan_in_fan_out)
        for half, array in zip("AB", pair, strict=True):
            tensors[f"base_model.model.{module}.lora_{half}.weight"] = array
        found[module] = row.rank
        written.append(path)
    return tensors, found, written


def _config(found: dict[str, int], fan_in_fan_out: bool) -> dict[str, Any]:
    """Returns the configuration that PEFT reads. A scale of alpha / rank = 1 for each module."""
    largest = max(found.values())
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": fan_in_fan_out,
        "r": largest,
        "lora_alpha": largest,
        "target_modules": list(found),
        "rank_pattern": found,
        "alpha_pattern": found,
    }


def extract_lora(
    base: FilePath,
    tuned: FilePath,
    out: FilePath,
    *,
    rule: ranks.RankRule = ranks.bema(),  # noqa: B008 - a frozen value
    where: Where | None = None,
    min_size: int = 50,
    exact_below: int = 4096,
    fan_in_fan_out: bool | None = None,
    progress: Progress = None,
) -> Difference:
    r"""Writes what a fine-tuning has changed as a low-rank adapter (LoRA).

    Each kernel gets the leading directions of its change, $\Delta W \approx B A$, with the rank
    that the rule finds. The adapter is `adapter_model.safetensors` and `adapter_config.json` with
    the names of PEFT: `base_model.model.MODULE.lora_A.weight`, and a `rank_pattern`.

    Args:
      base, tuned, rule, where, min_size, exact_below, progress: As in `analyze_difference`.
      out: The folder to write; it is made if it is not there.
      fan_in_fan_out: True for GPT-2, whose `c_attn`, `q_attn`, `c_proj` and `c_fc` are stored as
        (inputs, outputs) although their names end in "weight". Other kernels are not turned. None
        goes by shape: `c_attn` and `c_fc` have more outputs than inputs.

    Returns:
      A `Difference`. Its `written` names the kernels in the adapter, and their `removed` is the
      share of the squares of the change that the adapter lacks. Other changed kernels are not in
      it: stacks, convolutions, embedding tables, what is not named "weight" or "kernel", and
      changes of so high a rank that an adapter saves nothing.

    Raises:
      ValueError: No kernel can be in the adapter, or `out` would replace an input; or as in
        `analyze_difference`.
      OSError: A file cannot be read or written.

    Examples:
      >>> import jax, rmtjax, tempfile
      >>> from rmtjax import adapters
      >>> draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
      >>> base, change = draw(0, 128, 96), draw(1, 128, 4) @ draw(2, 4, 96)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     paths = f"{folder}/base.safetensors", f"{folder}/tuned.safetensors"
      ...     for path, kernel in zip(paths, (base, base + change)):
      ...         rmtjax.checkpoint.save(path, {"dense": {"kernel": kernel}})
      ...     found = adapters.extract_lora(*paths, folder, rule=rmtjax.ranks.energy(0.999))
      ...     print(found.report.rows[0].rank, found.report.rows[0].removed < 1e-3)
      4 True

    References:
      Hu et al., ICLR (2022), https://arxiv.org/abs/2106.09685.
    """
    sizes: dict[str, Any] = {"min_size": min_size, "exact_below": exact_below}
    options = PlanOptions(rule, where=where, multiple=1, **sizes)
    _check_targets(base, tuned, Path(out))
    with analyzed(base, tuned, options, progress, "extract_lora") as (change, difference):
        leaves = find_leaves(change, read_manifest(change))
        turned = _inputs_first(leaves) if fan_in_fan_out is None else fan_in_fan_out
        tensors, found, written = _halves(leaves, difference, turned)
    if not found:
        raise ValueError(
            f"no kernel of {str(tuned)!r} has a change of low rank by {rule}: look at the reasons "
            "of `analyze_difference`, or give a rank by `rule=rmtjax.ranks.fixed(16)`."
        )
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    save(folder / _FILES[0], tensors)
    with replacing(folder / _FILES[1]) as file:
        file.write(json.dumps(_config(found, turned), indent=2).encode())
    return difference._replace(written=tuple(written))
