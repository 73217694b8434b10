"""The full-size model, 61 layers and one expert on each of 128 devices, compiled without its weights."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from moe_ep import override
from moe_ep.parameter_counts import parameters_by_part
from moe_ep.mesh import TOKENS, expert_degree, make_mesh
from moe_ep.train.state import abstract_state
from moe_ep.train.step import make_evaluate, make_step


def test_seed_e128_compiles_on_128_emulated_devices():
    config = override.load("configs/seed_e128.py")
    dispatch = dataclasses.replace(config.dispatch, transport="all_to_all", overlap="none", chunks=1)
    config = dataclasses.replace(config, dispatch=dispatch)
    mesh = make_mesh(config.mesh, config.cluster, config.model.moe.num_experts)
    assert expert_degree(mesh) == 128
    state = abstract_state(config, mesh)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.parameters)) == sum(parameters_by_part(config.model).values())
    shape = (config.train.batch_sequences, config.train.sequence + 1)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, TOKENS))
    text = make_evaluate(config, mesh).lower(state.parameters, tokens, state.bias).compile().as_text()
    # The MoE layers are one loop body: its dispatch and its combine.
    assert text.count(" all-to-all(") == 2
    # Training keeps what crossed the network, so the backward pass adds one of each and sends nothing again.
    text = make_step(config, mesh).lower(state, tokens).compile().as_text()
    assert text.count(" all-to-all(") == 4
