"""Checkpoints that carry their plan: .safetensors files and orbax folders.

What is restored is checked first, name by name, against what was saved and against the tree that
is to be filled: either all of it is there, or an error names what is not. Every library of the
safetensors format reads these files, and orbax these folders. Factors stand in them as `PATH/left`
and `PATH/right`.
"""

from rmtjax.checkpoint._open import (
    check_target as check_target,
    open_tensors as open_tensors,
    replacing as replacing,
    Tensors as Tensors,
)
from rmtjax.checkpoint._save_restore import plan as plan, restore as restore, save as save
from rmtjax.checkpoint._stream import analyze_file as analyze_file, compress_file as compress_file
from rmtjax.checkpoint._tensor_names import (
    find_leaves as find_leaves,
    is_kernel_tensor as is_kernel_tensor,
    read_manifest as read_manifest,
)

__all__ = ["analyze_file", "compress_file", "plan", "restore", "save"]
