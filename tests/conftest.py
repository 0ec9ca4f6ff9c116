"""Sets up every test: no silent broadcasting, reproducible draws, programs compiled once."""

import gc
import os
from pathlib import Path

import threadpoolctl

# OpenBLAS starts a thread per core in each test process, and its threads spin while they wait. On
# two busy cores, 60 SVDs of 200 x 300 took 1.3 s with one thread and 52 s with two. Tests pass with
# any number, but slowly. NumPy was loaded before this file, by the plugin of jaxtyping, so that it
# no longer reads the variable; SciPy and other processes do.
if "OPENBLAS_NUM_THREADS" not in os.environ:
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    threadpoolctl.threadpool_limits(1, "blas")

# Most of the time goes into compiling, so LLVM's optimizations are left out. They change numbers
# by rounding only. `JAX_DISABLE_MOST_OPTIMIZATIONS=0` tests with them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# Compiled programs are kept on disk, for all processes of a run and for the next run, which then
# takes less than half of the CPU time. JAX's key is the program with its flags and versions, so a
# change of the code is compiled anew. By default JAX keeps only what took a second to compile.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "programs")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis
import jax
import jax.experimental
import pytest
from helpers.page_browser import driver as driver, show as show

# XLA's older emitters compile in half the time of the newer ones. A program is compiled in one
# part, not in one for each thread: each core has a test process already, and the parts cost 5 %
# more CPU time. XLA stops at a flag that it does not know, and later versions may drop these.
if jax.version.__version_info__ < (0, 11):
    others = os.environ.get("XLA_FLAGS", "")
    ours = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{ours} {others}"
if jax.version.__version_info__ < (0, 7):  # programs read from the disk give NaN in jax 0.6
    jax.config.update("jax_enable_compilation_cache", False)
if not hasattr(jax, "enable_x64"):  # its name before jax 0.8
    jax.enable_x64 = jax.experimental.enable_x64
jax.config.update("jax_numpy_rank_promotion", "raise")
# A first example compiles, which no deadline allows for.
hypothesis.settings.register_profile("rmtjax", deadline=None, derandomize=True)
hypothesis.settings.load_profile("rmtjax")


def pytest_ignore_collect(collection_path, config):
    """Skips files that name no slow test, if those alone are asked for: imports take 5 s."""
    if config.option.markexpr == "slow" and collection_path.suffix == ".py":
        return True if "slow" not in collection_path.read_text().lower() else None
    return None


def pytest_collection_modifyitems(items):
    # Slow tests start first, so that at the end no process waits for a long one.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish():
    # Python's collector need not go through all modules and tests again: 7 % of the CPU time.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Clears programs: each holds several of the 65,530 memory mappings that Linux allows."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def no_width(monkeypatch):
    """Tables have the width of a terminal, which processes of the suite inherit in a variable."""
    monkeypatch.delenv("COLUMNS", raising=False)


def installed(*finders):
    """Returns what functions find of installed packages; skips without, or fails if required."""
    try:
        return [find() for find in finders]
    except FileNotFoundError as error:
        if os.environ.get("RMTJAX_REQUIRE_DATA") == "1":
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def minilm_folder():
    """Returns the folder of the pretrained encoder."""
    from experiments.minilm import weights

    return installed(weights.find_folder)[0]


@pytest.fixture(scope="session")
def efficientnet_files():
    """Returns the file of the pretrained convolutional network, and the folder of pictures."""
    from experiments.efficientnet import images, weights

    return installed(weights.find_file, images.find_folder)
