"""The engine on emulated devices: what comes out does not depend on who else is in it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_ep.config import DispatchConfig
from moe_ep.mesh import TOKENS, shardings, vary
from moe_ep.model.transformer import Transformer, for_platform
from moe_ep.serve import Engine, EngineSize, QueueFull, Refused, Request
from moe_ep.serve.programs import any_routing, serving_dispatch
from moe_ep.serve.sampler import greedy
from tests.train.small import MODEL, make_config, mesh_of

SERVED = for_platform(MODEL, "cpu")
MESH = mesh_of(make_config(), expert=2, data=2)
SIZE = EngineSize(
    slots=2, chunk_sequences=2, chunk_tokens=8, page_rows=8, pages=9, pages_per_sequence=5, queue=6
)
TIGHT = DispatchConfig(overlap="none", margin_sigmas=0.0)  # buffers of the mean: most steps do not fit


@functools.cache
def parameters():
    """Returns random values in the model's tree: its own initialisation takes longer to compile than to test."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: Transformer(jax.random.key(0), SERVED))
    values = jax.tree.map(lambda leaf: random.normal(0.0, 0.25, leaf.shape).astype(leaf.dtype), shapes)
    return jax.device_put(values, shardings(MESH, nnx.get_partition_spec(shapes)))


BIAS = jnp.zeros((MODEL.moe_layers, MODEL.moe.num_experts), jnp.float32)


@pytest.fixture(scope="module")
def engine():
    """Returns a warm engine on 2 x 2 devices, whose usual programs' buffers are too small for most steps."""
    made = Engine(SERVED, parameters(), BIAS, MESH, SIZE, dispatch=TIGHT)
    made.warm_up()
    return made


def random_requests(count, seed=0):
    random = np.random.default_rng(seed)
    return [
        Request(
            f"r{index}",
            random.integers(1, MODEL.vocabulary, random.integers(1, 21)).tolist(),
            max_tokens=int(random.integers(1, 21)),
            temperature=float(index % 3 == 0),
            seed=index,
            stop=(7,),
        )
        for index in range(count)
    ]


def complete(engine, requests):
    return {update.id: update.completion for update in engine.complete(requests) if update.completion}


def test_each_request_gets_what_it_gets_alone_and_nothing_is_compiled(engine):
    requests = random_requests(24)
    compiled = engine.statistics().programs_compiled
    assert compiled == 4  # prompts and tokens, for the usual and for any routing
    together = complete(engine, requests)
    assert engine.statistics().steps_run_again > 0
    assert engine.statistics().most_pages_in_use <= SIZE.pages
    assert {completion.finish for completion in together.values()} == {"stop", "length"}
    for request in requests[:8]:
        alone = complete(engine, [request])[request.id]
        assert alone.tokens == together[request.id].tokens
    assert engine.statistics().programs_compiled == compiled
    assert engine.idle


def test_greedy_tokens_are_those_of_the_whole_sequence(engine):
    requests = [dataclasses.replace(one, temperature=0.0, stop=()) for one in random_requests(8, seed=1)]
    answers = complete(engine, requests)
    whole = np.zeros((len(requests), SIZE.context), np.int32)
    for row, request in enumerate(requests):
        tokens = [*request.prompt, *answers[request.id].tokens]
        whole[row, : len(tokens)] = tokens
    dispatch = any_routing(serving_dispatch(TIGHT))
    forward = jax.shard_map(
        lambda model, bias, tokens: vary(model).logits(vary(model)(tokens, vary(bias), dispatch)[0]),
        mesh=MESH, in_specs=(nnx.get_partition_spec(parameters()), P(), TOKENS), out_specs=TOKENS,
    )  # fmt: skip
    likeliest = np.asarray(jax.jit(forward)(parameters(), BIAS, whole)).argmax(-1)
    for row, request in enumerate(requests):
        first, tokens = len(request.prompt) - 1, answers[request.id].tokens
        np.testing.assert_array_equal(likeliest[row, first : first + len(tokens)], tokens)


def test_the_others_are_unharmed_by_what_is_cancelled_or_refused(engine):
    requests = [dataclasses.replace(one, stop=()) for one in random_requests(6, seed=2)]
    expected = complete(engine, requests)
    long = Request("long", [1, 2, 3], max_tokens=30)
    engine.submit(long)
    engine.submit(dataclasses.replace(long, id="waits"))
    assert engine.cancel("waits")
    updates = [update for _ in range(6) for update in engine.step()]
    assert updates[0] == ("waits", (), ("waits", (), "cancelled", "", ()))
    with pytest.raises(Refused, match="id 'long'"):
        engine.submit(long)
    assert engine.cancel("long") and not engine.cancel("long")
    bad = [Request("empty", []), Request("over-long", [1] * 30, max_tokens=30), Request("outside", [MODEL.vocabulary])]
    answers = complete(engine, [*requests[:3], *bad, requests[0], *requests[3:]])
    assert answers["long"].finish == "cancelled" and 0 < len(answers["long"].tokens) < 30
    assert "prompt is empty" in answers["empty"].message
    assert "need 59 rows of cache: allowed is 40" in answers["over-long"].message
    assert "allowed is 0 to 63" in answers["outside"].message
    duplicate = answers.pop(requests[0].id)
    assert duplicate.finish == "length" or "that has not ended" in duplicate.message
    for request in requests[1:]:
        assert answers[request.id].tokens == expected[request.id].tokens


def test_a_full_queue_says_so_and_takes_requests_again(engine):
    requests = [dataclasses.replace(one, stop=()) for one in random_requests(SIZE.queue + 1, seed=3)]
    for request in requests[:-1]:
        engine.submit(request)
    assert not engine.has_room
    with pytest.raises(QueueFull, match="6 requests wait, the most allowed"):
        engine.submit(requests[-1])
    answers, streamed = {}, {}
    while not engine.idle:
        updates = engine.step()
        if len(requests) > SIZE.queue and engine.has_room:
            engine.submit(requests.pop())
        for update in updates:
            streamed[update.id] = streamed.get(update.id, ()) + update.tokens
            answers |= {update.id: update.completion} if update.completion else {}
    assert set(answers) == {f"r{index}" for index in range(SIZE.queue + 1)}
    assert streamed == {id: completion.tokens for id, completion in answers.items()}


def test_a_greedy_engine_refuses_to_draw():
    cold = Engine(SERVED, parameters(), BIAS, MESH, SIZE, dispatch=TIGHT, sampler=greedy)
    with pytest.raises(Refused, match="temperature=0.5: allowed is 0, this engine is greedy"):
        cold.submit(Request("a", [1], temperature=0.5))
