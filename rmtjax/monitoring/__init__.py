"""Spectra against time: columns of kernels while they train, and what they become.

`monitor` is a transform that measures chosen columns of chosen kernels every so many steps, and
changes no update. Its state goes in and out of `jit` with that of the optimizer, and
`rmtjax.metrics` reads it. `History` keeps the looks as dictionaries and as lines of a file.
"""

from rmtjax.monitoring._history import History as History
from rmtjax.monitoring._monitor import monitor as monitor
from rmtjax.monitoring._state import KernelLook as KernelLook, MonitorState as MonitorState
