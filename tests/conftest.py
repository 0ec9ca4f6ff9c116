"""Settings of every test: no silent broadcasting, no luck."""

import hypothesis
import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
# A first example compiles, which no deadline allows for.
hypothesis.settings.register_profile("rmtjax", deadline=None, derandomize=True)
hypothesis.settings.load_profile("rmtjax")
