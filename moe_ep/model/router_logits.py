"""The router's product in float32, for BF16 tokens on tensor cores.

A float32 number is the sum of three BF16 numbers, and a product of two BF16 numbers is exact in
float32. So a BF16 token times float32 weights is three products of BF16 operands, added up in
float32: as precise as a float32 product, which has no tensor cores (TF32 would round) and first
wants a float32 copy of the tokens.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Float32

from moe_ep.kernels.grouped_matmul import varying
from moe_ep.shapes import RouterLogits, TokenRows

# A product's tiles on a GPU; with fewer of them than this a product of few rows leaves it idle.
_TILE, _TILES_ENOUGH, _PIECE = 32, 128, 128
# With fewer rows for each expert, taking the weights apart moves more bytes than a float32 copy of the tokens.
_ROWS_AN_EXPERT = 2


def logits_of(x: TokenRows, matrix: Float32[Array, "D E"]) -> RouterLogits:
    """Returns x @ matrix with products and sums in float32, differentiable; gradients likewise, rounded to each operand's type."""
    if x.dtype == jnp.bfloat16 and x.shape[0] >= _ROWS_AN_EXPERT * matrix.shape[1]:
        return _bfloat16_logits(*(varying.match(operand, x, matrix) for operand in (x, matrix)))
    # HIGHEST keeps float32 products float32: GPUs would round them to TF32.
    return _product(x.astype(jnp.float32), matrix, "highest")


@jax.custom_vjp
def _bfloat16_logits(x, matrix):
    return _sum_of_three(_product(x, _side_by_side(_split(matrix)), None))


def _forward(x, matrix):
    return _bfloat16_logits(x, matrix), (x, matrix)


def _backward(saved, gradient):
    x, matrix = saved
    d_high, d_middle, d_low = _split(gradient)
    high, middle, _ = _split(matrix)
    d_matrix = _sum_of_three(lax.dot_general(
        x, _side_by_side((d_high, d_middle, d_low)), (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
    ))  # fmt: skip
    # The rest is below 2^-16 of the largest term, and the result is rounded to BF16 anyway.
    terms = _side_by_side((d_high, d_high, d_middle)), _side_by_side((high, middle, high))
    d_x = lax.dot_general(*terms, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return d_x.astype(x.dtype), d_matrix


_bfloat16_logits.defvjp(_forward, _backward)


def _split(values: Float32[Array, "a b"]) -> list[Float[Array, "a b"]]:
    """Returns three BF16 arrays that add up to the values, largest first."""
    parts = []
    for _ in range(3):
        # Not a cast there and back, which XLA may leave out.
        part = lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        values = values - part
    return parts


def _side_by_side(parts) -> Float[Array, "a b3"]:
    return jnp.concatenate(parts, axis=1)


def _sum_of_three(parts: Float32[Array, "a b3"]) -> Float32[Array, "a b"]:
    high, middle, low = jnp.split(parts, 3, axis=1)
    return high + (middle + low)


def _product(x: Float[Array, "t D"], matrix: Float[Array, "D N"], precision: str | None) -> Float32[Array, "t N"]:
    """Returns x @ matrix; of few rows in pieces of the width that are then added up.

    Decoding 32 tokens at width 7168 and 8 experts, a product in one piece took 0.22 ms
    on an H200, a sixth of the layer: one tile, and no other to share the width with.
    """
    (tokens, width), columns = x.shape, matrix.shape[1]
    tiles = -(-tokens // _TILE) * -(-columns // _TILE)
    if tiles >= _TILES_ENOUGH or width % _PIECE:
        return jnp.dot(x, matrix, precision=precision, preferred_element_type=jnp.float32)
    pieces = jnp.einsum(
        "tcd,cde->cte", x.reshape(tokens, -1, _PIECE), matrix.reshape(-1, _PIECE, columns),
        precision=precision, preferred_element_type=jnp.float32,
    )  # fmt: skip
    return jnp.sum(pieces, axis=0)
