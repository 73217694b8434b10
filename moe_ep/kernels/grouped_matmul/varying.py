"""Inside shard_map, values vary over mesh axes; operands of one loop or kernel must agree on which."""

import jax
from jax import lax


def axes_of(*trees) -> frozenset[str]:
    """Returns the mesh axes that any of the arrays varies over; none outside shard_map."""
    leaves = jax.tree.leaves(trees)
    return frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in leaves))


def match(tree, *others):
    """Returns `tree` marked as varying over every axis that it or `others` vary over.

    The mark's transpose is the sum over the added axes, so cotangents come back with
    the type of what was marked.
    """
    axes = axes_of(tree, *others)

    def mark(leaf):
        missing = tuple(sorted(axes - axes_of(leaf)))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(mark, tree)
