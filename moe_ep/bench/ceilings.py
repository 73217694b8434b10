"""What the first device reaches at most, measured: a large copy and a large product."""

import jax
import jax.numpy as jnp

from moe_ep.bench import kernel_cases, torch_rivals
from moe_ep.bench.timing import measure_in_turns

_SIDE = 8192
_COPIED_VALUES = 2**30


def measure_ceilings() -> dict[str, float]:
    """Returns bytes read and written a second by the fastest copy, and FLOPs a second of a bfloat16 product, on random data."""
    keys = jax.random.split(jax.random.key(0), 3)
    normal = jax.jit(lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1)
    left, right = (normal(key, (_SIDE, _SIDE)) for key in keys[:2])
    values = normal(keys[2], (_COPIED_VALUES,))
    contenders = {
        "copy by XLA": kernel_cases.jax_contender(jnp.copy, values),
        "negation by XLA": kernel_cases.jax_contender(jnp.negative, values),
        **torch_rivals.copy(values),
        "product": kernel_cases.jax_contender(lambda x, y: x @ y, left, right),
    }
    times = measure_in_turns(contenders, samples=9, sample_seconds=0.05)
    product = times.pop("product")
    return {
        "copy_bytes_per_s": 2 * values.nbytes / min(copy.median for copy in times.values()),
        "product_flops_per_s": 2.0 * _SIDE**3 / product.median,
    }
