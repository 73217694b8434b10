"""Activations of the expert MLP and their derivatives, as kernels and references share them.

All arithmetic is in float32; a kernel applies it to its accumulator before rounding.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Of GELU's tanh form: tanh(x (_LINEAR + _CUBIC x^2)).
_LINEAR = 0.7978845608028654  # sqrt(2 / pi)
_CUBIC = 0.044715 * _LINEAR


class Activation(NamedTuple):
    """A function of the first products of an MLP, and its pullback.

    inputs: how many products it takes (2 when gated: the gate first).
    value: products -> hidden.
    pullback: (products, gradient of hidden) -> (hidden, gradient of each product).
    """

    inputs: int
    value: Callable
    pullback: Callable


def _identity_value(products):
    return products[0]


def _identity_pullback(products, gradient):
    return products[0], (gradient,)


# In the fewest multiply-adds: in a kernel's epilogue the tensor cores wait for them.
def _gelu_value(products):
    (x,) = products
    half = 0.5 * x
    return half + half * jnp.tanh(x * (_LINEAR + _CUBIC * (x * x)))


def _gelu_pullback(products, gradient):
    (x,) = products
    square = x * x
    tanh = jnp.tanh(x * (_LINEAR + _CUBIC * square))
    share = 0.5 + 0.5 * tanh  # of x that passes
    slope = share + (share - share * tanh) * (x * (_LINEAR + 3.0 * _CUBIC * square))
    return x * share, (gradient * slope,)


def _silu_gated_value(products):
    gate, x = products
    return gate * _sigmoid(gate) * x


def _silu_gated_pullback(products, gradient):
    gate, x = products
    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid
    slope = sigmoid + silu * (1.0 - sigmoid)
    return silu * x, (gradient * x * slope, gradient * silu)


def _sigmoid(x):
    # By tanh, which neither overflows nor divides and is one instruction on a GPU.
    return 0.5 * jnp.tanh(0.5 * x) + 0.5


ACTIVATIONS = {
    None: Activation(1, _identity_value, _identity_pullback),
    "gelu": Activation(1, _gelu_value, _gelu_pullback),
    "silu_gated": Activation(2, _silu_gated_value, _silu_gated_pullback),
}


def apply_in_float32(activation: Activation, products: tuple[jax.Array, ...]) -> jax.Array:
    """Returns hidden, rounded to the products' type."""
    return activation.value(_widened(products)).astype(products[0].dtype)


def pull_back_in_float32(activation: Activation, products: tuple[jax.Array, ...], gradient: jax.Array):
    """Returns (hidden, gradients of the products), rounded to the products' type."""
    hidden, gradients = activation.pullback(_widened(products), gradient.astype(jnp.float32))
    dtype = products[0].dtype
    return hidden.astype(dtype), tuple(gradient.astype(dtype) for gradient in gradients)


def _widened(products):
    return tuple(product.astype(jnp.float32) for product in products)
