"""Settings of every test: no silent broadcasting, no luck."""

import os

# OpenBLAS and XLA each start a thread a core; on few cores they stall one another.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Most of the time goes into compiling: LLVM's optimizations are left out. They change no number by
# more than rounding; `JAX_DISABLE_MOST_OPTIMIZATIONS=0` tests with them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import hypothesis
import jax
import jax.experimental
import pytest
from helpers.page_browser import driver as driver, show as show

# XLA's older emitters take half the time of the newer ones, too. A flag that it does not know would
# stop it: those of versions to come are not known.
if jax.version.__version_info__ < (0, 11):
    others = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {others}"
if not hasattr(jax, "enable_x64"):  # its name before jax 0.8
    jax.enable_x64 = jax.experimental.enable_x64
jax.config.update("jax_numpy_rank_promotion", "raise")
# A first example compiles, which no deadline allows for.
hypothesis.settings.register_profile("rmtjax", deadline=None, derandomize=True)
hypothesis.settings.load_profile("rmtjax")

# What takes longest, so that no process is left with it while the others have nothing to do.
LONG = {"test_architectures", "test_devices", "test_notebooks", "test_stream_memory", "test_study"}


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Each program holds several mappings of memory, of which a process may have 65,530."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def minilm_folder():
    """The pretrained encoder's files; skips, or fails where data are required, without them."""
    from experiments.minilm import weights

    try:
        return weights.find_folder()
    except FileNotFoundError as error:
        if os.environ.get("RMTJAX_REQUIRE_DATA") == "1":
            raise
        pytest.skip(str(error))
