"""Decoding over the latent cache gives what the whole sequence gives at once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_ep.config import AttentionConfig, ClusterConfig, DispatchConfig, MeshConfig, ModelConfig, MoEConfig
from moe_ep.mesh import ALL_AXES, TOKENS, make_mesh, shardings, vary
from moe_ep.model.kv_cache import CACHE, bytes_per_token, make_cache, round_up_rows, with_rows
from moe_ep.model.transformer import Transformer

SEQUENCES, PROMPT, STEPS = 8, 12, 12
MODEL = ModelConfig(
    layers=3,
    dense_layers=1,
    width=32,
    hidden=48,
    vocabulary=64,
    dtype="float32",
    attention=AttentionConfig(
        heads=4, nope_dim=6, rope_dim=4, value_dim=8, latent_dim=16, rope_layout="interleaved", implementation="xla"
    ),
    moe=MoEConfig(num_experts=8, top_k=2, hidden=24, shared_experts=1),
)
FITS = 1e9  # sigmas of margin: buffers for the worst routing


@functools.cache
def values():
    """Returns random values in the model's tree: its own initialisation takes longer to compile than to test."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: Transformer(jax.random.key(0), MODEL))
    return jax.tree.map(lambda leaf: random.normal(0.0, 0.25, leaf.shape).astype(leaf.dtype), shapes)


@functools.cache
class Served:
    """The model's three programs on a mesh of so many devices."""

    def __init__(self, expert: int, **dispatch):
        cluster = ClusterConfig(gpus_per_node=min(expert, 4), nics_per_node=1)
        self.mesh = make_mesh(MeshConfig(1, expert), cluster, 8, jax.devices()[:expert])
        self.specs = nnx.get_partition_spec(values())
        self.parameters = jax.device_put(values(), shardings(self.mesh, self.specs))
        self.dispatch = DispatchConfig(**({"overlap": "none", "margin_sigmas": FITS} | dispatch))
        self.bias = jnp.asarray(np.random.default_rng(1).normal(0.0, 0.01, (MODEL.moe_layers, 8)), jnp.float32)
        self.forward = self._program(self._forward, (TOKENS,), TOKENS)
        self.prefill = self._program(self._prefill, (TOKENS, TOKENS), (TOKENS, CACHE))
        self.extend = self._program(self._extend, (TOKENS, TOKENS, CACHE, TOKENS, TOKENS), (TOKENS, CACHE, P()), donated=4)
        self.decode = self._program(self._decode, (TOKENS, CACHE, TOKENS, TOKENS), (TOKENS, CACHE, P()), donated=3)

    def _forward(self, model, bias, tokens):
        return model.logits(model(tokens, bias, self.dispatch)[0])

    def _prefill(self, model, bias, tokens, lengths):
        return model.prefill(tokens, lengths, bias, self.dispatch)[:2]

    def _extend(self, model, bias, tokens, counts, cache, starts, pages):
        logits, cache, report = model.extend(tokens, counts, cache, starts, bias, self.dispatch, pages)
        return logits, cache, jax.lax.psum(jnp.sum(report.expert_counts), ALL_AXES)

    def _decode(self, model, bias, tokens, cache, lengths, pages):
        logits, cache, report = model.decode(tokens, cache, lengths, bias, self.dispatch, pages)
        return logits, cache, jax.lax.pmax(jnp.max(report.dispatch.waves_needed), ALL_AXES)

    def _program(self, on_device, in_specs, out_specs, donated=()):
        marked = lambda model, bias, *rest: on_device(vary(model), vary(bias), *rest)  # noqa: E731
        sharded = jax.shard_map(marked, mesh=self.mesh, in_specs=(self.specs, P(), *in_specs), out_specs=out_specs)
        return jax.jit(sharded, donate_argnums=donated)

    def own_pages(self):
        """Returns the table of sequences that each have a page to themselves: numbers are a device's own."""
        per_device = SEQUENCES // self.mesh.size
        return jnp.tile(jnp.arange(per_device, dtype=jnp.int32), self.mesh.size)[:, None]


def inputs(steps):
    random = np.random.default_rng(2)
    tokens = random.integers(0, MODEL.vocabulary, (SEQUENCES, PROMPT + steps)).astype(np.int32)
    lengths = random.integers(1, PROMPT + 1, SEQUENCES).astype(np.int32)
    lengths[:2] = 1, PROMPT
    return tokens, lengths


def decode_along(served, tokens, lengths, steps, cache, pages):
    """Yields the logits after each given token, and how many waves its routing needed."""
    for _ in range(steps):
        given = np.take_along_axis(tokens, lengths[:, None], axis=1)[:, 0]
        logits, cache, waves = served.decode(served.parameters, served.bias, given, cache, lengths, pages)
        yield np.asarray(logits), int(waves)
        lengths = lengths + 1


def at(logits, positions):
    return np.take_along_axis(np.asarray(logits), positions[:, None, None], axis=1)[:, 0]


def largest_difference(served, steps=STEPS):
    """Returns the largest difference of any logit, prompts of different lengths and `steps` tokens after them."""
    tokens, lengths = inputs(steps)
    whole = served.forward(served.parameters, served.bias, tokens)
    first, cache = served.prefill(served.parameters, served.bias, tokens[:, :PROMPT], lengths)
    differences = [np.abs(first - at(whole, lengths - 1)).max()]
    cache, compiled = with_rows(cache, round_up_rows(PROMPT + steps)), 0
    decoded = decode_along(served, tokens, lengths, steps, cache, served.own_pages())
    for step, (logits, waves) in enumerate(decoded):
        assert waves == 1
        compiled = compiled if step else served.decode._cache_size()
        differences.append(np.abs(logits - at(whole, lengths + step)).max())
    assert served.decode._cache_size() == compiled, "lengths must not compile a program each"
    return max(differences)


CASES = [
    (1, {}),
    (8, {}),
    (8, {"transport": "all_gather"}),
    (2, {}),
    (4, {"overlap": "staggered"}),
]


@pytest.mark.parametrize(("expert", "dispatch"), CASES, ids=str)
def test_decode_gives_the_logits_of_the_whole_sequence(expert, dispatch):
    assert largest_difference(Served(expert, **dispatch)) < 1e-5


def test_pages_in_any_order_give_what_one_page_a_sequence_gives():
    served, random = Served(2), np.random.default_rng(3)
    tokens, lengths = inputs(STEPS)
    rows, per_device = 8, SEQUENCES // 2
    pages_each = -(-(PROMPT + STEPS) // rows)
    empty = make_cache(MODEL, SEQUENCES, round_up_rows(PROMPT + STEPS))
    one_page = decode_along(served, tokens, 0 * lengths, STEPS, empty, served.own_pages())
    # A device has twice the pages that its sequences need, handed out at random.
    shuffled = [random.permutation(2 * per_device * pages_each)[: per_device * pages_each] for _ in range(2)]
    pages = np.concatenate(shuffled).reshape(SEQUENCES, pages_each).astype(np.int32)
    in_pages = decode_along(served, tokens, 0 * lengths, STEPS, make_cache(MODEL, 4 * per_device * pages_each, rows), pages)
    for (expected, _), (logits, _) in zip(one_page, in_pages, strict=True):
        np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_prompts_in_chunks_give_the_logits_of_the_whole_sequence_and_count_only_their_tokens():
    served, chunk, rows = Served(2), 5, 8
    tokens, lengths = inputs(STEPS)
    lengths = lengths + STEPS  # of one to 24 tokens: up to five chunks, others have ended long before
    whole = served.forward(served.parameters, served.bias, tokens)
    pages_each = -(-tokens.shape[1] // rows)
    pages = np.random.default_rng(3).permuted(np.tile(np.arange(4 * pages_each), (2, 1)), axis=1).reshape(SEQUENCES, -1)
    cache = jax.tree.map(lambda leaf: leaf + 1, make_cache(MODEL, SEQUENCES * pages_each, rows))
    padded = np.pad(tokens, ((0, 0), (0, chunk)))
    for start in range(0, tokens.shape[1], chunk):
        counts = np.clip(lengths - start, 0, chunk).astype(np.int32)
        starts = np.where(counts > 0, start, 0).astype(np.int32)
        logits, cache, counted = served.extend(
            served.parameters, served.bias, padded[:, start : start + chunk], counts, cache, starts, pages.astype(np.int32)
        )
        assert counted == MODEL.moe_layers * MODEL.moe.top_k * counts.sum()
        ends = counts > 0
        np.testing.assert_allclose(
            np.asarray(logits)[ends], at(whole, np.maximum(start + counts - 1, 0))[ends], atol=1e-5
        )


def test_a_step_whose_routing_needs_more_waves_can_be_run_again_on_the_cache_that_came_back():
    tokens, lengths = inputs(1)
    given = np.take_along_axis(tokens, lengths[:, None], axis=1)[:, 0]
    enough, short = Served(2), Served(2, margin_sigmas=0.0)
    _, cache = enough.prefill(enough.parameters, enough.bias, tokens[:, :PROMPT], lengths)
    cache = with_rows(cache, round_up_rows(PROMPT + 1))
    copy = jax.tree.map(jnp.copy, cache)
    expected, expected_cache, _ = enough.decode(enough.parameters, enough.bias, given, cache, lengths, enough.own_pages())
    _, after_short, waves = short.decode(short.parameters, short.bias, given, copy, lengths, short.own_pages())
    assert waves > 1
    again, again_cache, _ = enough.decode(enough.parameters, enough.bias, given, after_short, lengths, enough.own_pages())
    np.testing.assert_array_equal(again, expected)
    jax.tree.map(np.testing.assert_array_equal, again_cache, expected_cache)


def test_a_full_page_table_writes_nothing():
    served = Served(2)
    before = jax.tree.map(lambda leaf: leaf + 1, make_cache(MODEL, SEQUENCES, 64))
    kept = jax.tree.map(np.array, before)
    full = np.full(SEQUENCES, 64, np.int32)
    _, after, _ = served.decode(served.parameters, served.bias, full % 63, before, full, served.own_pages())
    jax.tree.map(np.testing.assert_array_equal, after, kept)


def test_a_cached_token_costs_its_latent_and_its_rotary_key_in_every_layer():
    cache = make_cache(MODEL, sequences=2, rows=64)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) == 2 * 64 * bytes_per_token(MODEL)
    assert bytes_per_token(MODEL) == 3 * (16 + 4) * 4
    all_routed = dataclasses.replace(MODEL, dense_layers=0)
    assert make_cache(all_routed, 2, 64).dense is None
    assert cache.rows == 64
