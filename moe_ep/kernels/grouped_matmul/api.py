"""The public products: checks, the choice of an implementation, and the custom VJPs."""

import functools
from typing import NamedTuple

import jax

from moe_ep.kernels.grouped_matmul import activations, choice, reference, varying
from moe_ep.kernels.grouped_matmul.checks import check_groups, check_matmul, check_mlp
from moe_ep.kernels.grouped_matmul.groups import RowGroups


class ExpertWeights(NamedTuple):
    """The weights of G experts: w_in and w_gate [G, D, F], w_out [G, F, D]; no gate for "gelu"."""

    w_in: jax.Array
    w_out: jax.Array
    w_gate: jax.Array | None = None


def grouped_matmul(
    x: jax.Array, w: jax.Array, groups: RowGroups, *, activation: str | None = None, implementation: str | None = None
) -> jax.Array:
    """Returns activation(x @ w[group of the row]), differentiable in x and w.

    Args:
      x: [R, K], rows sorted by group as `groups` says; pad rows of valid tiles zero.
      w: [G, K, N], of x's type.
      groups: the layout of the rows.
      activation: None or "gelu" (tanh form), applied in float32.
      implementation: a name of `choice.IMPLEMENTATIONS`; None takes what is fastest here.
    Returns:
      [R, N] of x's type; rows of skipped tiles are unspecified, in the gradient too.
    Raises:
      ValueError: a rank, size, type or layout that the implementation does not take.
    """
    check_groups(x, groups)
    check_matmul(x, w, activation)
    name = implementation or choice.choose(x, groups, w.shape)
    choice.check_takes(name, x, groups, w.shape)
    if name == "reference":
        return reference.grouped_matmul(x, w, groups, activation)
    x, w, groups = (varying.match(value, x, w, groups) for value in (x, w, groups))
    return _matmul(x, w, groups, activation, name)


def expert_mlp(
    rows: jax.Array, weights: ExpertWeights, groups: RowGroups, *, activation: str, implementation: str | None = None
) -> jax.Array:
    """Returns the MLP of each row's expert, differentiable in rows and weights.

    "gelu": gelu(rows @ w_in) @ w_out; "silu_gated": (silu(rows @ w_gate) * (rows @ w_in)) @ w_out.

    Args:
      rows: [R, D], sorted by expert as `groups` says; pad rows of valid tiles zero.
      weights: of G experts, of the rows' type; cotangents have each weight's own
        type, summed over mesh axes that only the rows vary over.
      groups: the layout of the rows.
      activation: "gelu" (tanh form) or "silu_gated".
      implementation: a name of `choice.IMPLEMENTATIONS`; None takes what is fastest here.
    Returns:
      [R, D] of the rows' type; rows of skipped tiles are unspecified, in the gradient too.
    Raises:
      ValueError: a rank, size, type or layout that the implementation does not take.
    """
    check_groups(rows, groups)
    check_mlp(rows, weights, activation)
    name = implementation or choice.choose(rows, groups, weights.w_in.shape)
    choice.check_takes(name, rows, groups, weights.w_in.shape)
    first = (weights.w_in,) if weights.w_gate is None else (weights.w_gate, weights.w_in)
    if name == "reference":
        return reference.expert_mlp(rows, first, weights.w_out, groups, activation)
    operands = (rows, first, weights.w_out, groups)
    return _mlp(*(varying.match(operand, *operands) for operand in operands), activation, name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _matmul(x, w, groups, activation, name):
    return choice.IMPLEMENTATIONS[name].hidden(x, (w,), groups, activation)


def _matmul_forward(x, w, groups, activation, name):
    out, products = choice.IMPLEMENTATIONS[name].hidden_and_products(x, (w,), groups, activation)
    return out, (x, w, groups, products)


def _matmul_backward(activation, name, saved, d_out):
    x, w, groups, products = saved
    implementation = choice.IMPLEMENTATIONS[name]
    _, d_products = activations.pull_back_in_float32(activations.ACTIVATIONS[activation], products, d_out)
    d_x = implementation.rows_gradient(d_products, (w,), groups)
    return d_x, implementation.weight_gradient(x, d_products[0], groups, w.shape[0]), None


_matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _mlp(rows, first, w_out, groups, activation, name):
    implementation = choice.IMPLEMENTATIONS[name]
    return implementation.product(implementation.hidden(rows, first, groups, activation), w_out, groups)


def _mlp_forward(rows, first, w_out, groups, activation, name):
    implementation = choice.IMPLEMENTATIONS[name]
    hidden, products = implementation.hidden_and_products(rows, first, groups, activation)
    # Hidden is not kept: the backward pass computes it again from the products it keeps anyway.
    return implementation.product(hidden, w_out, groups), (rows, first, w_out, groups, products)


def _mlp_backward(activation, name, saved, d_out):
    rows, first, w_out, groups, products = saved
    implementation = choice.IMPLEMENTATIONS[name]
    hidden, d_products = implementation.product_gradients(d_out, w_out, products, groups, activation)
    d_rows = implementation.rows_gradient(d_products, first, groups)
    weight_gradient = functools.partial(implementation.weight_gradient, groups=groups, group_count=w_out.shape[0])
    d_first = tuple(weight_gradient(rows, d_product) for d_product in d_products)
    return d_rows, d_first, weight_gradient(hidden, d_out), None


_mlp.defvjp(_mlp_forward, _mlp_backward)
