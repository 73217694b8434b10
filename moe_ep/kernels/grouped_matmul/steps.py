"""What an implementation provides, and the plain way to make it of three products."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from moe_ep.kernels.grouped_matmul import activations


class Products(NamedTuple):
    """The three products of a linear map by groups.

    forward: (x [R, K], w [G, K, N], groups) -> [R, N].
    input_gradient: (dy [R, N], w [G, K, N], groups) -> [R, K].
    weight_gradient: (x [R, K], dy [R, N], groups, G) -> [G, K, N].
    """

    forward: Callable
    input_gradient: Callable
    weight_gradient: Callable


class Steps(NamedTuple):
    """The steps of an expert MLP's forward and backward pass, each one kernel where there are kernels.

    `first` is the tuple of first weights [G, D, F] (two when gated, the gate first)
    and `products` the tuple of rows @ first, before the activation.

    hidden: (rows, first, groups, activation) -> hidden [R, F].
    hidden_and_products: the same -> (hidden, products), what a backward pass needs.
    product: (hidden, w_out [G, F, D], groups) -> [R, D].
    product_gradients: (d_out [R, D], w_out, products, groups, activation)
        -> (hidden, d_products).
    rows_gradient: (d_products, first, groups) -> d_rows [R, D].
    weight_gradient: (x [R, K], dy [R, N], groups, G) -> [G, K, N].
    """

    hidden: Callable
    hidden_and_products: Callable
    product: Callable
    product_gradients: Callable
    rows_gradient: Callable
    weight_gradient: Callable


def steps_of(products: Products) -> Steps:
    """Returns the steps made of separate products, the activation applied by XLA between them."""

    def hidden_and_products(rows, first, groups, activation):
        pre = tuple(products.forward(rows, w, groups) for w in first)
        return activations.apply_in_float32(activations.ACTIVATIONS[activation], pre), pre

    def hidden(rows, first, groups, activation):
        return hidden_and_products(rows, first, groups, activation)[0]

    def product_gradients(d_out, w_out, pre, groups, activation):
        d_hidden = products.input_gradient(d_out, w_out, groups)
        return activations.pull_back_in_float32(activations.ACTIVATIONS[activation], pre, d_hidden)

    def rows_gradient(d_products, first, groups):
        return sum_of(products.input_gradient(dy, w, groups) for dy, w in zip(d_products, first, strict=True))

    return Steps(
        hidden=hidden,
        hidden_and_products=hidden_and_products,
        product=products.forward,
        product_gradients=product_gradients,
        rows_gradient=rows_gradient,
        weight_gradient=products.weight_gradient,
    )


def sum_of(terms) -> jax.Array:
    """Returns the sum of one array or more, without a zero to start from."""
    total, *others = terms
    for term in others:
        total = total + term
    return total
