"""Random matrix theory for the weights of neural networks, in JAX."""

from rmtjax._version import __version__ as __version__
