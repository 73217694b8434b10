"""The import rule and who may issue what, read from the syntax tree of every file of moe_ep."""

import ast
import dataclasses
import pathlib
import typing

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# From the ground up: a module or package imports only from rows above its own, and from
# itself. Those of one row do not know each other.
LAYERS = (
    ("hardware", "shapes", "results", "progress"),
    ("config",),
    ("override", "command", "checks", "parameter_counts"),
    ("placement",),
    ("mesh", "metrics", "data", "cost", "kernels"),
    ("dispatch",),
    ("model",),
    ("train", "serve", "simulate"),
    ("programs",),
    ("aot", "bench"),
    ("run",),
)
LAYER = {name: layer for layer, names in enumerate(LAYERS) for name in names}

# These plan 128 GPUs on any machine within a second, so neither they nor what they import
# imports jax or what is built on it.
WITHOUT_JAX = ("config", "checks", "parameter_counts", "override", "command", "hardware", "placement", "metrics", "data", "cost", "simulate")
JAX_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax", "chex")

# Arrays in, arrays out.
KERNELS_MAY_IMPORT = ("kernels", "shapes")

# What moves rows between experts stands in dispatch/; what lists the devices that are here
# and arranges devices in mesh.py. (What kind of device this process has, anyone may ask.)
ALL_TO_ALLS = ("all_to_all", "ragged_all_to_all")
ROW_COLLECTIVES = (*ALL_TO_ALLS, "all_gather", "psum_scatter", "ppermute", "pshuffle")
DEVICE_FUNCTIONS = ("devices", "make_mesh", "Mesh", "create_device_mesh", "create_hybrid_device_mesh")


@dataclasses.dataclass(frozen=True)
class Module:
    """One file: its dotted name, its place in the house and its syntax tree."""

    name: str  # moe_ep.dispatch.plan; a package's __init__ has the package's name
    is_package: bool
    tree: ast.Module

    @property
    def part(self) -> str:
        """The module or package right under moe_ep that it belongs to; "" for moe_ep itself."""
        return part_of(self.name)


def part_of(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def read_module(path: pathlib.Path, root: pathlib.Path) -> Module:
    parts = path.relative_to(root).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    name = ".".join(parts[:-1] if is_package else parts)
    return Module(name, is_package, ast.parse(path.read_text(encoding="utf-8"), str(path)))


MODULES = {module.name: module for module in (read_module(path, ROOT) for path in ROOT.glob("moe_ep/**/*.py"))}


def imports(module: Module) -> typing.Iterator[tuple[str, int]]:
    """Yields (absolute dotted name, line) of everything that it imports, inside functions too."""
    package = module.name if module.is_package else module.name.rpartition(".")[0]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                ancestors = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*ancestors, base]).rstrip(".")
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def project_imports(module: Module) -> typing.Iterator[tuple[str, int]]:
    for name, line in imports(module):
        if name.split(".")[0] == "moe_ep" and name != "moe_ep":
            yield name, line


def wrong_imports(module: Module) -> list[str]:
    """Returns a line for each import that the layers do not allow."""
    wrong = []
    for name, line in project_imports(module):
        target = part_of(name)
        if target == module.part:
            continue
        if not module.part:
            wrong.append(f"{module.name}:{line} imports {name}: moe_ep/__init__.py imports nothing")
        elif target not in LAYER:
            wrong.append(f"{module.name}:{line} imports {name}: {target} has no row in LAYERS")
        elif LAYER[target] >= LAYER[module.part]:
            wrong.append(
                f"{module.name}:{line} imports {name}: {module.part} is in row {LAYER[module.part]}, "
                f"{target} in row {LAYER[target]}; only rows above are allowed"
            )
        elif module.part == "kernels" and target not in KERNELS_MAY_IMPORT:
            wrong.append(f"{module.name}:{line} imports {name}: kernels import nothing of the project but shapes")
    return wrong


def jax_imports(module: Module) -> list[str]:
    """Returns a line for each import that brings jax into a module that must do without."""
    if module.part not in WITHOUT_JAX:
        return []
    wrong = []
    for name, line in imports(module):
        if name.split(".")[0] in JAX_LIBRARIES:
            wrong.append(f"{module.name}:{line} imports {name}: {module.part} does without jax")
    for name, line in project_imports(module):
        if part_of(name) not in (*WITHOUT_JAX, module.part):
            wrong.append(f"{module.name}:{line} imports {name}, which may import jax: {module.part} does without")
    return wrong


def last_name(node: ast.expr) -> str:
    """Returns f of `f`, `a.f` and `a.b.f`."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def mentions_expert_axis(call: ast.Call) -> bool:
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    return any(last_name(node) == "EXPERT" for value in given for node in ast.walk(value) if isinstance(node, ast.expr))


def wrong_collectives(module: Module) -> list[str]:
    """Returns a line for each call outside dispatch/ that moves rows along the expert axis."""
    if module.part == "dispatch":
        return []
    wrong = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call):
            name = last_name(node.func)
            if name in ALL_TO_ALLS or (name in ROW_COLLECTIVES and mentions_expert_axis(node)):
                wrong.append(f"{module.name}:{node.lineno} calls {name}: only dispatch/ moves rows between experts")
    return wrong


def bindings(module: Module) -> dict[str, str]:
    """Returns what each imported name stands for: {"lax": "jax.lax"} after `from jax import lax`."""
    bound = {}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom):
            bound |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            bound |= {alias.asname: alias.name for alias in node.names if alias.asname}
    return bound


def wrong_devices(module: Module) -> list[str]:
    """Returns a line for each call outside mesh.py that lists devices or arranges them."""
    if module.part == "mesh":
        return []
    bound, wrong = bindings(module), []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call):
            first, _, rest = ast.unparse(node.func).partition(".")
            name = ".".join(filter(None, (bound.get(first, first), rest)))
            if name.startswith("jax.") and name.rpartition(".")[2] in DEVICE_FUNCTIONS:
                wrong.append(f"{module.name}:{node.lineno} calls {name}: only mesh.py names devices")
    return wrong


RULES = (wrong_imports, jax_imports, wrong_collectives, wrong_devices)


def test_every_part_of_moe_ep_has_a_layer():
    unknown = {module.part for module in MODULES.values()} - set(LAYER) - {""}
    assert not unknown, f"moe_ep/{', moe_ep/'.join(sorted(unknown))}: give each a row in LAYERS of {__file__}"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_its_rules(rule):
    broken = [line for module in MODULES.values() for line in rule(module)]
    assert not broken, "\n" + "\n".join(broken)


# Each rule finds what it forbids, however it is written, and leaves what is allowed.
PLANTED = [
    (wrong_imports, "dispatch.plan", "from moe_ep.model import moe", 1),
    (wrong_imports, "dispatch.plan", "from moe_ep import mesh, placement", 0),
    (wrong_imports, "dispatch.plan", "from . import wire\nfrom .wire import send", 0),
    (wrong_imports, "dispatch.plan", "from ..train import loop", 1),
    (wrong_imports, "train.loop", "def f():\n    import moe_ep.serve.engine", 1),
    (wrong_imports, "mesh", "from moe_ep import metrics", 1),
    (wrong_imports, "model.moe", "from moe_ep.surprise import x", 1),
    (wrong_imports, "kernels.grouped_matmul.api", "from moe_ep import config", 1),
    (wrong_imports, "kernels.grouped_matmul.api", "from moe_ep.kernels import x\nfrom moe_ep import shapes", 0),
    (jax_imports, "cost.memory", "import jax.numpy as jnp", 1),
    (jax_imports, "simulate.timeline", "from moe_ep import shapes", 1),
    (jax_imports, "simulate.timeline", "from moe_ep.cost import memory\nimport numpy", 0),
    (jax_imports, "model.moe", "import jax", 0),
    (wrong_collectives, "model.moe", "from jax import lax\nlax.all_to_all(x, 'gpu', 0, 0)", 1),
    (wrong_collectives, "model.moe", "lax.all_gather(x, axis_name=mesh.EXPERT)", 1),
    (wrong_collectives, "model.mla", "lax.all_gather(w, 'gpu')\nlax.psum(x, EXPERT)", 0),
    (wrong_collectives, "dispatch.wire", "jax.lax.ragged_all_to_all(x, EXPERT)", 0),
    (wrong_devices, "train.loop", "import jax\njax.devices()[0]", 1),
    (wrong_devices, "train.loop", "jax.sharding.Mesh(grid, ('gpu',))", 1),
    (wrong_devices, "train.loop", "from jax.sharding import Mesh as M\nM(grid, ('gpu',))", 1),
    (wrong_devices, "train.loop", "from moe_ep.mesh import make_mesh\nmake_mesh(config)", 0),
    (wrong_devices, "train.loop", "mesh.devices.size\narray.devices()\njax.local_devices()", 0),
    (wrong_devices, "mesh", "jax.make_mesh((2,), ('gpu',))", 0),
]


@pytest.mark.parametrize("rule, name, source, found", PLANTED)
def test_a_rule_finds_what_it_forbids(rule, name, source, found):
    assert len(rule(Module("moe_ep." + name, False, ast.parse(source)))) == found
