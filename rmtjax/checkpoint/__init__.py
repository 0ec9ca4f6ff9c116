"""Checkpoints that carry their plan, in .safetensors files and orbax folders.

`save` writes a parameter tree with its plan, `restore` fills a tree or names what does not fit, and
`load_plan` returns the plan alone. `save_moments` and `load_moments` do so for the moments of the
inputs of kernels. `analyze_file`, `compress_file` and `compare_files` work on files that are larger
than memory. Other programs can read the results: factors are tensors with the names `PATH/left` and
`PATH/right`.
"""

from rmtjax.checkpoint._compare import (
    compare_files as compare_files,
    Comparison as Comparison,
    Drift as Drift,
    Sums as Sums,
)
from rmtjax.checkpoint._manifest import read_manifest as read_manifest
from rmtjax.checkpoint._moments import (
    load_moments as load_moments,
    save_moments as save_moments,
)
from rmtjax.checkpoint._open import check_target as check_target, open_tensors as open_tensors
from rmtjax.checkpoint._safetensors import replacing as replacing
from rmtjax.checkpoint._save_restore import load_plan as load_plan, restore as restore, save as save
from rmtjax.checkpoint._stream import (
    analyze_file as analyze_file,
    analyze_tensors as analyze_tensors,
    compress_file as compress_file,
)
from rmtjax.checkpoint._tensor_names import (
    choose as choose,
    find_leaves as find_leaves,
    is_kernel_tensor as is_kernel_tensor,
)
from rmtjax.checkpoint._tensors import Entry as Entry, FilePath as FilePath, Tensors as Tensors

__all__ = [
    "Comparison",
    "Drift",
    "analyze_file",
    "compare_files",
    "compress_file",
    "load_moments",
    "load_plan",
    "restore",
    "save",
    "save_moments",
]
