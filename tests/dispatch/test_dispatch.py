"""Every transport, on emulated devices, against one device that computes every expert for every token."""

import contextlib
import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec as P

from moe_ep.config import ClusterConfig, ConfigError, DispatchConfig, MeshConfig
from moe_ep.dispatch import TRANSPORTS, DispatchCounts, Exchange, check_chunks, check_transport, exchange_rows, make_exchange
from moe_ep.kernels.grouped_matmul import ExpertWeights, expert_mlp
from moe_ep.mesh import ALL_AXES, EXPERT, TOKENS, make_mesh, vary

WIDTH, HIDDEN = 16, 24


def make_inputs(tokens, experts, top_k, routing, seed=0):
    """Returns token rows, weights of the experts, choices and their weights."""
    random = np.random.default_rng(seed)
    scores = random.normal(size=(tokens, experts))
    if routing == "zipf":
        scores += -3.0 * np.log(np.arange(1, experts + 1))
    choices = np.argsort(-scores, axis=1)[:, :top_k]
    if routing == "same":
        choices = np.broadcast_to(np.arange(top_k), (tokens, top_k))
    weights = random.uniform(0.1, 1.0, size=(tokens, top_k))
    return (
        jnp.asarray(random.normal(size=(tokens, WIDTH)), jnp.float32),
        ExpertWeights(
            jnp.asarray(random.normal(size=(experts, WIDTH, HIDDEN)) / 4, jnp.float32),
            jnp.asarray(random.normal(size=(experts, HIDDEN, WIDTH)) / 4, jnp.float32),
            None,
        ),
        jnp.asarray(choices, jnp.int32),
        jnp.asarray(weights, jnp.float32),
    )


def dense_oracle(tokens, experts, choices, weights):
    """Computes every expert for every token, and keeps what was chosen."""
    hidden = jax.nn.gelu(jnp.einsum("td,edf->tef", tokens, experts.w_in), approximate=True)
    outputs = jnp.einsum("tef,efd->ted", hidden, experts.w_out)
    chosen = jnp.take_along_axis(outputs, choices[:, :, None], axis=1)
    return jnp.sum(chosen * weights[:, :, None], axis=1)


def routed(mesh, exchange):
    """Returns the layer on a mesh, from whole arrays to whole arrays, with counts summed over devices."""

    def on_device(tokens, experts, choices, weights):
        experts = vary(experts)
        apply = lambda rows, groups: expert_mlp(rows, experts, groups, activation="gelu")  # noqa: E731
        output, counts = exchange_rows(tokens, choices, weights, apply, exchange)
        counts = vary(counts)
        totals = jax.tree.map(lambda count: jax.lax.psum(count, ALL_AXES), counts)
        return output, totals._replace(waves_needed=jax.lax.pmax(counts.waves_needed, ALL_AXES))

    specs = (TOKENS, ExpertWeights(P(EXPERT), P(EXPERT), None), TOKENS, TOKENS)
    return jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=(TOKENS, DispatchCounts(*(P(),) * 4)))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_experts_are_told_how_many_rows_to_expect_whatever_the_buffer_holds(transport):
    told = []

    def experts(rows, groups):
        told.append((groups.expected_rows, rows.shape[0]))
        return rows

    def on_device(tokens, choices, weights):
        return exchange_rows(tokens, choices, weights, experts, exchange)[0]

    exchange = Exchange(experts=4, peers=4, tokens=128, top_k=2, transport=transport)
    tokens, _, choices, weights = make_inputs(4 * 128, 4, 2, "uniform")
    program = jax.shard_map(on_device, mesh=layer_mesh(4, experts=4), in_specs=(TOKENS,) * 3, out_specs=TOKENS)
    jax.eval_shape(program, tokens, choices, weights)
    ((expected, buffer),) = told
    assert expected == 256 < buffer


def run_until_it_fits(mesh, exchange, inputs, target):
    """Returns output, counts and gradients of the first program with waves enough, and how many it took."""
    tries = 0
    while True:
        tries += 1

        def loss(tokens, experts, weights):
            output, counts = routed(mesh, exchange)(tokens, experts, inputs[2], weights)
            return jnp.sum(output * target), (output, counts)

        differentiated = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
        (_, (output, counts)), gradients = differentiated(inputs[0], inputs[1], inputs[3])
        if counts.waves_needed <= exchange.waves:
            return output, counts, gradients, tries
        exchange = exchange.with_waves(int(counts.waves_needed))


def oracle(inputs, target):
    def loss(tokens, experts, weights):
        output = dense_oracle(tokens, experts, inputs[2], weights)
        return jnp.sum(output * target), output

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(inputs[0], inputs[1], inputs[3])


def largest_error(actual, expected):
    """Returns the largest difference of any leaf relative to that leaf's largest entry."""

    def error(actual, expected):
        return float(jnp.max(jnp.abs(actual - expected)) / jnp.max(jnp.abs(expected)))

    return max(jax.tree.leaves(jax.tree.map(error, actual, expected)))


def layer_mesh(expert, data=1, gpus_per_node=8, experts=8):
    cluster = ClusterConfig(gpus_per_node=gpus_per_node, nics_per_node=1)
    return make_mesh(MeshConfig(data, expert), cluster, experts, jax.devices()[: expert * data])


def check_equal_to_oracle(mesh, exchange, inputs):
    target = jnp.asarray(np.random.default_rng(1).normal(size=inputs[0].shape), jnp.float32)
    output, counts, gradients, tries = run_until_it_fits(mesh, exchange, inputs, target)
    expected_gradients, expected = oracle(inputs, target)
    assert largest_error(output, expected) < 1e-5
    assert largest_error(gradients, expected_gradients) < 1e-5
    assert int(counts.rows_dropped) == 0
    return counts, tries


@pytest.mark.parametrize("routing", ["uniform", "zipf", "same"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_layer_equals_dense_oracle(transport, routing):
    inputs = make_inputs(tokens=8 * 64, experts=8, top_k=2, routing=routing)
    exchange = Exchange(experts=8, peers=8, tokens=64, top_k=2, transport=transport)
    counts, tries = check_equal_to_oracle(layer_mesh(8), exchange, inputs)
    # Only uneven routing needs more waves than one, and then one more try.
    assert tries == (1 if routing == "uniform" else 2)
    assert int(counts.waves_needed) > 1 or routing == "uniform"


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    ("expert", "data", "gpus_per_node", "chunks"), [(1, 1, 8, 1), (2, 2, 8, 2), (4, 2, 2, 3)]
)
def test_meshes_and_chunks(transport, expert, data, gpus_per_node, chunks):
    inputs = make_inputs(tokens=256, experts=8, top_k=2, routing="uniform")
    exchange = Exchange(
        experts=8, peers=expert, tokens=256 // (expert * data), top_k=2, transport=transport, chunks=chunks
    )
    check_equal_to_oracle(layer_mesh(expert, data, gpus_per_node), exchange, inputs)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_one_expert_on_each_of_128_devices(transport):
    inputs = make_inputs(tokens=128 * 16, experts=128, top_k=2, routing="uniform")
    exchange = Exchange(experts=128, peers=128, tokens=16, top_k=2, transport=transport)
    check_equal_to_oracle(layer_mesh(128, experts=128), exchange, inputs)


# Every program has waves for the worst routing that four devices of 24 tokens can make.
_PROGRAMS = {
    "all_to_all": Exchange(8, 4, 24, 3, "all_to_all", waves=3, chunks=2, margin_sigmas=0.5),
    "all_gather": Exchange(8, 4, 24, 3, "all_gather", waves=3, chunks=1, margin_sigmas=1.0),
}


@functools.cache
def _any_routing_program(transport):
    return jax.jit(routed(layer_mesh(4), _PROGRAMS[transport]))


@pytest.mark.parametrize("transport", _PROGRAMS)
@hypothesis.given(skew=st.floats(0.0, 9.0), seed=st.integers(0, 2**16))
def test_any_routing_is_dropless(transport, skew, seed):
    tokens, experts, _, weights = make_inputs(4 * 24, 8, 3, "uniform", seed)
    scores = np.random.default_rng(seed).normal(size=(4 * 24, 8)) - skew * np.log(np.arange(1, 9))
    choices = jnp.asarray(np.argsort(-scores, axis=1)[:, :3], jnp.int32)
    output, counts = _any_routing_program(transport)(tokens, experts, choices, weights)
    assert largest_error(output, dense_oracle(tokens, experts, choices, weights)) < 1e-5
    assert int(counts.rows_dropped) == 0
    assert int(counts.waves_needed) <= 3


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_drops_are_counted(transport):
    tokens, choices = 64, jnp.zeros((8 * 64, 2), jnp.int32).at[:, 1].set(1)
    inputs = make_inputs(8 * tokens, 8, 2, "same")
    exchange = Exchange(experts=8, peers=8, tokens=tokens, top_k=2, transport=transport)
    mesh = layer_mesh(8)
    _, counts = jax.jit(routed(mesh, exchange))(inputs[0], inputs[1], choices, inputs[3])
    capacity = TRANSPORTS[transport].queue_rows(exchange)
    buffers = 2 * (8 if transport == "all_to_all" else 1)  # queues of the two experts chosen by all
    assert int(counts.rows_dropped) == 8 * tokens * 2 - buffers * capacity


def compiled_text(mesh, exchange, experts):
    tokens = exchange.tokens * exchange.peers
    inputs = make_inputs(tokens, experts, exchange.top_k, "uniform")
    return jax.jit(routed(mesh, exchange)).lower(*inputs).compile().as_text()


@pytest.mark.parametrize(("waves", "chunks"), [(1, 1), (2, 1), (1, 2)])
def test_two_all_to_alls_a_slice(waves, chunks):
    exchange = Exchange(experts=128, peers=128, tokens=16, top_k=2, waves=waves, chunks=chunks)
    text = compiled_text(layer_mesh(128, experts=128), exchange, 128)
    assert text.count(" all-to-all(") == 2 * waves * chunks


@pytest.mark.parametrize(("transport", "most"), [("all_to_all", 24), ("all_gather", 186)])
def test_a_chunk_holds_a_row(transport, most):
    def check(chunks):
        dispatch = DispatchConfig(transport, "chunks", chunks)
        check_chunks(dispatch, experts=16, peers=16, tokens=64, top_k=2)

    check(most)
    with pytest.raises(ConfigError, match=f"--set dispatch.chunks={most + 1}: allowed is 1 to {most} with 64 tokens"):
        check(most + 1)


def test_no_communication_on_one_device():
    sizes = {"experts": 8, "peers": 1, "tokens": 64, "top_k": 2}
    (exchange,) = {make_exchange(DispatchConfig(transport), **sizes) for transport in TRANSPORTS}
    text = compiled_text(layer_mesh(1), exchange, 8)
    assert not any(name in text for name in ("all-to-all", "all-gather", "reduce-scatter"))


def test_chunks_and_waves_of_one_device_hold_every_row_once():
    dispatch = DispatchConfig("all_to_all", "chunks", chunks=2, waves=2)
    exchange = make_exchange(dispatch, experts=8, peers=1, tokens=64, top_k=2)
    assert exchange.slices == 4
    counts, _ = check_equal_to_oracle(layer_mesh(1), exchange, make_inputs(64, 8, 2, "zipf"))
    assert (int(counts.rows_sent), int(counts.rows_padded), int(counts.waves_needed)) == (0, 0, 1)


def is_pad(rows, groups):
    """Returns which rows of valid tiles hold no data, [R, 1]."""
    tiles = groups.tile_rows.shape[0]
    row = jnp.arange(rows.shape[0] // tiles)[None, :]
    valid = jnp.arange(tiles)[:, None] < groups.valid_tiles
    return (valid & (row >= groups.tile_rows[:, None])).reshape(-1, 1)


@jax.custom_vjp
def spoiled_by_pad_rows(rows, groups):
    """Returns rows, NaN if a pad row among them is not zero; gradients likewise."""
    return jnp.where(jnp.any(is_pad(rows, groups) & (rows != 0)), jnp.nan, rows)


spoiled_by_pad_rows.defvjp(
    lambda rows, groups: (spoiled_by_pad_rows(rows, groups), groups),
    lambda groups, gradient: (spoiled_by_pad_rows(gradient, groups), None),
)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_pad_rows_and_their_gradients_are_zero(transport):
    """As a weight gradient, which may leave them out, takes for granted."""
    tokens, _, choices, weights = make_inputs(2 * 32, 8, 2, "zipf")
    exchange = Exchange(8, 2, 32, 2, transport, waves=3, margin_sigmas=0.0)
    pads = []

    def on_device(tokens, choices, weights):
        def experts(rows, groups):
            pads.append(jnp.sum(is_pad(rows, groups)))
            return spoiled_by_pad_rows(rows, groups)

        output, pull_back = jax.vjp(lambda tokens: exchange_rows(tokens, choices, weights, experts, exchange)[0], tokens)
        return output, pull_back(jnp.ones_like(output))[0], sum(pads)[None]

    spread = jax.shard_map(on_device, mesh=layer_mesh(2), in_specs=(TOKENS,) * 3, out_specs=(TOKENS,) * 3)
    output, gradient, padded = jax.jit(spread)(tokens, choices, weights)
    total = jnp.sum(weights, axis=1, keepdims=True)
    np.testing.assert_allclose(output, tokens * total, rtol=1e-5)
    np.testing.assert_allclose(gradient, jnp.broadcast_to(total, gradient.shape), rtol=1e-5)
    assert (padded > 0).all()


def test_plan_memory_is_linear_in_assignments():
    """No array of the plan, or of making it, is larger than a few times tokens x top-k plus the buffers."""
    exchange = Exchange(experts=128, peers=128, tokens=4096, top_k=2)
    transport = TRANSPORTS["all_to_all"]
    jaxpr = jax.make_jaxpr(functools.partial(transport.plan, exchange=exchange))(jnp.zeros((4096, 2), jnp.int32))
    largest = max(variable.aval.size for equation in jaxpr.eqns for variable in equation.outvars)
    assert largest <= 4 * max(4096 * 2, 128 * transport.queue_rows(exchange))


@dataclasses.dataclass(frozen=True)
class _Device:
    platform: str
    process_index: int
    id: int


@pytest.mark.parametrize(("platform", "processes", "transport", "runs"), [
    ("gpu", (0, 0), "ragged", True), ("gpu", (0, 1), "ragged", False), ("gpu", (0, 1), "all_to_all", True),
    ("cpu", (0, 1), "ragged", True),
])  # fmt: skip
def test_ragged_rows_between_processes_of_gpus_are_refused(platform, processes, transport, runs):
    devices = [_Device(platform, process, index) for index, process in enumerate(processes)]
    mesh = Mesh(np.array(devices).reshape(1, 1, 2), ALL_AXES)
    with contextlib.nullcontext() if runs else pytest.raises(ConfigError, match="dispatch.transport=ragged: allowed is all_to_all"):
        check_transport(transport, mesh)
