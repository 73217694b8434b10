"""The names under which arrays of a tree are stored, so that any tool can read them one by one."""

import jax


def by_path(tree: object) -> dict[str, object]:
    """Returns the tree's leaves under their dotted paths, such as "parameters.moe.first.attention.up"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"".join(_name(key) for key in path).strip("."): leaf for path, leaf in leaves}


def _name(key: object) -> str:
    name = getattr(key, "name", getattr(key, "key", getattr(key, "idx", None)))
    return "" if name == "value" else f".{name}"
