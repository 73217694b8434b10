"""Every test runs strictly, on 128 emulated CPU devices, with the types of every call into moe_ep checked."""

import os

EMULATED_DEVICES = 128

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join([
    os.environ.get("XLA_FLAGS", ""),
    f"--xla_force_host_platform_device_count={EMULATED_DEVICES}",
    # Programs here are compiled once and run a few times: half the time is LLVM's optimiser.
    "--xla_backend_optimization_level=0",
    # 128 devices share a few cores, so the last may reach a collective long after the first.
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
])  # fmt: skip

import hypothesis  # noqa: E402  (the environment above is read when jax is imported)
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import tests.typecheck  # noqa: E402, F401  (the hook below looks it up by name)

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Annotations become checks at each call, shapes included; it must come before moe_ep is imported.
jaxtyping.install_import_hook("moe_ep", "tests.typecheck.checked")

# The same examples in every run. HYPOTHESIS_PROFILE=search looks for new ones.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.register_profile("search", deadline=None, max_examples=500)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
