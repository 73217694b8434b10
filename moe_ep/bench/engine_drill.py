"""Drills the serving engine on the devices at hand: many requests at once, each of which must get what it gets alone.

    scripts/drill_engine [--requests=500 --steps=200 --seed=N]

The small preset's model with random weights. Writes <out>/engine_drill.{json,md};
ends with exit code 1 if anything was not as it must be.
"""

import dataclasses
import functools
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_ep import results
from moe_ep.bench import command, report
from moe_ep.config import ClusterConfig, Config, DispatchConfig, MeshConfig, ModelConfig, cpu8_tiny
from moe_ep.mesh import TOKENS, make_mesh, shardings, some_devices, vary
from moe_ep.model.kv_cache import CACHE, make_cache
from moe_ep.model.transformer import Transformer, for_platform
from moe_ep.programs import init_served_parameters
from moe_ep.serve import Completion, Engine, EngineSize, Refused, Request

_REQUESTS = flags.DEFINE_integer("requests", 500, "Requests that go through the engine.", lower_bound=10)
_STEPS = flags.DEFINE_integer("steps", 200, "Tokens that are decoded beside the teacher-forced forward.", lower_bound=1)
_TOLERANCE = 1e-4  # of logits, float32
_PROMPT, _NEW = 120, 60  # tokens at most
SIZE = EngineSize(
    slots=4, chunk_sequences=2, chunk_tokens=32, page_rows=16, pages=40, pages_per_sequence=12, queue=64
)
_TIGHT = DispatchConfig(margin_sigmas=1.0)  # routing that is uneven does not fit, and the step runs again


@dataclasses.dataclass(frozen=True)
class Row:
    """One thing that must be so."""

    check: str
    figure: str
    shown: bool


@functools.cache
def _model() -> ModelConfig:
    return for_platform(cpu8_tiny().model, "cpu")


@functools.cache
def _parameters(mesh: Mesh, seed: int) -> Transformer:
    values = _values(seed)
    return jax.device_put(values, shardings(mesh, nnx.get_partition_spec(values)))


@functools.cache
def _values(seed: int) -> Transformer:
    return jax.device_get(init_served_parameters(Config(model=_model(), seed=seed), _mesh(1, 1)))


def _bias() -> jax.Array:
    return jnp.zeros((_model().moe_layers, _model().moe.num_experts), jnp.float32)


def _mesh(data: int, expert: int) -> Mesh:
    cluster = ClusterConfig(gpus_per_node=min(expert, 4), nics_per_node=1)  # wide meshes have two nodes
    return make_mesh(MeshConfig(data, expert), cluster, _model().moe.num_experts, some_devices(data * expert))


def _engine(mesh: Mesh, seed: int, size: EngineSize = SIZE, **dispatch: Any) -> Engine:
    dispatch = dataclasses.replace(_TIGHT, **dispatch)
    engine = Engine(_model(), _parameters(mesh, seed), _bias(), mesh, size, dispatch=dispatch)
    engine.warm_up()
    return engine


def _requests(count: int, seed: int, drawn: bool) -> list[Request]:
    """Returns requests of random lengths, every second one drawn at random if `drawn`, the others greedy."""
    random = np.random.default_rng(seed)
    return [
        Request(
            f"request {index}",
            random.integers(0, _model().vocabulary, random.integers(1, _PROMPT + 1)).tolist(),
            max_tokens=int(random.integers(1, _NEW + 1)),
            temperature=float(drawn and index % 2),
            seed=index,
            stop=(256,),
        )
        for index in range(count)
    ]


def _complete(engine: Engine, requests: list[Request]) -> dict[str, Completion]:
    return {update.id: update.completion for update in engine.complete(requests) if update.completion}


def _tokens(completions: dict[str, Completion]) -> dict[str, tuple[int, ...]]:
    return {id: completion.tokens for id, completion in completions.items()}


def many_requests(seed: int, count: int) -> list[Row]:
    """Runs all requests at once and then each alone in the same engine."""
    engine = _engine(_mesh(1, jax.device_count()), seed)
    requests = _requests(count, seed, drawn=True)
    before, live_bytes, together, steps = engine.statistics(), [], {}, 0
    started = time.perf_counter()
    for update in engine.complete(requests):
        together |= {update.id: update.completion} if update.completion else {}
        steps += 1
        if steps % 500 == 1:
            live_bytes.append(sum(array.nbytes for array in jax.live_arrays()))
    seconds, busy = time.perf_counter() - started, engine.statistics()
    different = []
    for index, request in enumerate(requests):
        if _complete(engine, [request])[request.id].tokens != together[request.id].tokens:
            different.append(request.id)
        _progress("alone", index + 1, count)
    after, growth = engine.statistics(), (max(live_bytes) - live_bytes[0]) / live_bytes[0]
    finishes = [completion.finish for completion in together.values()]
    contiguous = SIZE.slots * SIZE.pages_per_sequence
    return [
        Row(
            f"{count} requests of 1 to {_PROMPT} + 1 to {_NEW} tokens answered",
            f"{len(together)} ({finishes.count('length')} at max_tokens, {finishes.count('stop')} at the end of a text) in "
            f"{busy.chunk_steps} chunk and {busy.decode_steps} decode steps, {seconds:.0f} s",
            len(together) == count and "refused" not in finishes,
        ),
        Row("their tokens, against each alone in the same programs", f"{count - len(different)} identical", not different),
        Row(
            "steps whose routing did not fit, run again",
            f"{busy.steps_run_again} of {busy.chunk_steps + busy.decode_steps}; no row dropped",
            busy.steps_run_again > 0,
        ),
        Row(
            "programs compiled in warm-up and after",
            f"{before.programs_compiled} and {after.programs_compiled - before.programs_compiled}",
            after.programs_compiled == before.programs_compiled,
        ),
        Row(
            "pages of a device in use at most, of its pool (a cache without pages would have)",
            f"{busy.most_pages_in_use} of {SIZE.pages} ({contiguous})",
            busy.most_pages_in_use <= SIZE.pages < contiguous,
        ),
        Row(
            "bytes of all live arrays while it runs, at most against the first",
            f"{growth:+.2%} of {live_bytes[0] / 1e6:.1f} MB",
            growth < 0.01,
        ),
    ]


def bad_requests(seed: int) -> list[Row]:
    """Sends cancelled, empty, over-long and duplicate requests among good ones."""
    engine = _engine(_mesh(1, jax.device_count()), seed)
    good = _requests(40, seed + 1, drawn=False)
    expected = _tokens(_complete(engine, good))
    bad = [
        Request("empty", []),
        Request("over-long", [1] * SIZE.context, max_tokens=9),
        Request("outside", [_model().vocabulary]),
        Request("no tokens", [1], max_tokens=0),
    ]
    messages, answers = [], {}
    for request in [*good[:20], *bad, good[3], *good[20:]]:
        try:
            engine.submit(request)
        except Refused as refusal:
            messages.append(f"{refusal.id}: {refusal}")
    cancelled = [request.id for request in good[1:40:13]]
    for _ in range(8):
        answers |= {update.id: update.completion for update in engine.step() if update.completion}
    cancelled = [id for id in cancelled if engine.cancel(id)]
    while not engine.idle:
        answers |= {update.id: update.completion for update in engine.step() if update.completion}
    wrong = [id for id in cancelled if answers[id].finish != "cancelled"]
    harmed = [request.id for request in good if request.id not in cancelled and answers[request.id].tokens != expected[request.id]]
    return [
        Row("empty, over-long, outside, no tokens, duplicate id: refused", "; ".join(messages), len(messages) == 5),
        Row("cancelled", f"{len(cancelled)}, each answered with the tokens it had", bool(cancelled) and not wrong),
        Row("the others unharmed", f"{len(good) - len(cancelled)} identical to a run without these", not harmed),
    ]


def layouts(seed: int) -> list[Row]:
    """Compares greedy tokens across EP degrees, data x expert, transports, and with one page a sequence."""
    requests, devices = _requests(32, seed + 2, drawn=False), jax.device_count()
    one_page = dataclasses.replace(SIZE, page_rows=SIZE.context, pages_per_sequence=1, pages=SIZE.slots)
    degrees = [expert for expert in (1, 2, 4, 8) if expert <= devices]
    cases = [(1, expert, "all_to_all", SIZE) for expert in degrees]
    cases += [(devices // expert, expert, "all_to_all", SIZE) for expert in degrees if 1 < expert < devices]
    cases += [(1, devices, transport, SIZE) for transport in ("all_gather", "ragged")]
    cases += [(1, devices, "all_to_all", one_page)]
    expected, rows = None, []
    for data, expert, transport, size in cases:
        tokens = _tokens(_complete(_engine(_mesh(data, expert), seed, size, transport=transport), requests))
        expected = expected or tokens
        same = sum(tokens[id] == expected[id] for id in expected)
        pages = f"pages of {size.page_rows}" if size is SIZE else "one page a sequence"
        rows.append(
            Row(
                f"greedy tokens, data {data} x EP {expert}, {transport}, {pages}",
                f"{same} of {len(expected)} requests identical to EP 1",
                same == len(expected),
            )
        )
        _progress("layouts", len(rows), len(cases))
    return rows


def logits(seed: int, steps: int) -> list[Row]:
    """Compares chunks and decoded tokens with the teacher-forced forward of whole sequences."""
    return [_largest_difference(expert, seed, steps) for expert in (1, 2, 8) if expert <= jax.device_count()]


def _largest_difference(expert: int, seed: int, steps: int) -> Row:
    mesh, random, chunk, page_rows = _mesh(1, expert), np.random.default_rng(seed), 16, 16
    parameters, bias, sequences = _parameters(mesh, seed), _bias(), 8
    forward, extend, decode = _logit_programs(mesh)
    prompts = random.integers(1, 3 * chunk + 1, sequences).astype(np.int32)
    tokens = random.integers(0, _model().vocabulary, (sequences, 3 * chunk + steps)).astype(np.int32)
    whole = np.asarray(forward(parameters, bias, tokens))
    pages_each = -(-tokens.shape[1] // page_rows)
    pool = random.permuted(np.tile(np.arange(sequences // expert * pages_each), (expert, 1)), axis=1)
    pages = pool.reshape(sequences, pages_each).astype(np.int32)
    cache = make_cache(_model(), sequences * pages_each, page_rows)
    difference, rows = 0.0, np.arange(sequences)
    for start in range(0, 3 * chunk, chunk):
        counts = np.clip(prompts - start, 0, chunk).astype(np.int32)
        starts, last = np.minimum(prompts, start).astype(np.int32), np.maximum(start + counts - 1, 0)
        got, cache = extend(parameters, bias, tokens[:, start : start + chunk], counts, cache, starts, pages)
        difference = max(difference, np.abs(np.asarray(got) - whole[rows, last])[counts > 0].max(initial=0.0))
    for step in range(steps):
        lengths = prompts + np.int32(step)
        got, cache = decode(parameters, bias, tokens[rows, lengths], cache, lengths, pages)
        difference = max(difference, float(np.abs(np.asarray(got) - whole[rows, lengths]).max()))
    return Row(
        f"logits of chunks and of {steps} decoded tokens against the teacher-forced forward, EP {expert}, float32",
        f"largest difference {difference:.1e} (allowed {_TOLERANCE:.0e}); logits up to {np.abs(whole).max():.1f}",
        difference < _TOLERANCE,
    )


def _logit_programs(mesh: Mesh) -> tuple:
    """Returns jitted forward, extend and decode that give logits, for any routing."""
    dispatch = DispatchConfig(overlap="none", margin_sigmas=1e9)
    specs = nnx.get_partition_spec(jax.eval_shape(lambda: Transformer(jax.random.key(0), _model())))

    def forward(model, bias, tokens):
        return model.logits(model(tokens, bias, dispatch)[0])

    def extend(model, bias, tokens, counts, cache, starts, pages):
        return model.extend(tokens, counts, cache, starts, bias, dispatch, pages)[:2]

    def decode(model, bias, tokens, cache, lengths, pages):
        return model.decode(tokens, cache, lengths, bias, dispatch, pages)[:2]

    def program(on_device, in_specs, out_specs):
        marked = lambda model, bias, *rest: on_device(vary(model), vary(bias), *rest)  # noqa: E731
        return jax.jit(jax.shard_map(marked, mesh=mesh, in_specs=(specs, P(), *in_specs), out_specs=out_specs))

    return (
        program(forward, (TOKENS,), TOKENS),
        program(extend, (TOKENS, TOKENS, CACHE, TOKENS, TOKENS), (TOKENS, CACHE)),
        program(decode, (TOKENS, CACHE, TOKENS, TOKENS), (TOKENS, CACHE)),
    )


def _progress(what: str, done: int, of: int) -> None:
    if done % max(of // 10, 1) == 0:
        print(f"{what}: {done} of {of}", file=sys.stderr, flush=True)


def as_markdown(result: dict) -> str:
    """Returns the table of a result."""
    lines = [
        report.heading("The serving engine under many requests", result),
        f"The small preset's model with random weights, seed {result['seed']}, on {result['devices']}; a device has "
        f"{SIZE.slots} slots, chunks of {SIZE.chunk_sequences} x {SIZE.chunk_tokens} tokens and {SIZE.pages} pages of "
        f"{SIZE.page_rows} rows. Counts and differences are what they would be on GPUs; times are not.\n\n",
        "| what | figure | as it must be |\n|---|---|---|\n",
    ]
    lines += [f"| {row['check']} | {row['figure']} | {'yes' if row['shown'] else 'NO'} |\n" for row in result["rows"]]
    return "".join(lines)


def main() -> None:
    seed = 0 if command.SEED.value is None else command.SEED.value
    result = {
        "kind": "measured",
        **report.provenance(results.command_line("moe_ep.bench.engine_drill"), command.COMMIT.value),
        "devices": f"{jax.device_count()} x {jax.default_backend()}, emulated where they are CPUs",
        "seed": seed,
    }
    rows = [
        *logits(seed, _STEPS.value), *layouts(seed), *many_requests(seed, _REQUESTS.value), *bad_requests(seed),
    ]  # fmt: skip
    result["rows"] = [dataclasses.asdict(row) for row in rows]
    markdown = as_markdown(result)
    print(markdown)
    for path in results.write(command.OUT.value, "engine_drill", result, markdown):
        print(f"wrote {path}", file=sys.stderr)
    sys.exit(0 if all(row.shown for row in rows) else 1)


if __name__ == "__main__":
    command.run(main)
