"""Bandwidth of the transports' own collectives over message sizes, in the manner of nccl-tests.

A message is what one device sends to all, itself included (all_to_all, ragged), what
it has after gathering (all_gather), or what it adds up (psum_scatter, the way back of
all_gather). The algorithm's bandwidth is the message over the time; the bus bandwidth
is that times (n - 1) / n, what crosses a device's links (nccl-tests, doc/PERFORMANCE.md).
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import BFloat16

from moe_ep.bench import report
from moe_ep.bench.sweep import make_key
from moe_ep.bench.timing import Contender, measure_in_turns
from moe_ep.config import Config, DispatchConfig, MeshConfig, require
from moe_ep.dispatch import TRANSPORTS, Exchange, check_transport, make_exchange
from moe_ep.mesh import ALL_AXES, EXPERT, TOKENS, compiler_options, make_mesh, some_devices, vary
from moe_ep.metrics import human_bytes
from moe_ep.progress import Finished, Progress, Rows

_WIDEST_ROW = 1024
_SAMPLES = 7
_GROWTH = 4  # of a message to the next

MessageRows = BFloat16[Array, "_ D"]


class Message(NamedTuple):
    """`peers` x `rows` rows of `width` bfloat16 values."""

    peers: int
    rows: int
    width: int

    @property
    def bytes(self) -> int:
        return 2 * self.peers * self.rows * self.width


class Collective(NamedTuple):
    """One collective inside shard_map.

    move(rows, message) -> what arrived; `expected` is what must; `again` makes rows of what arrived.
    """

    rows: Callable[[Message], MessageRows]
    move: Callable[[MessageRows, Message], Array]
    expected: Callable[[Message], Array]
    again: Callable[[Array, Message], MessageRows]


def _value(source: Array, place: Array, width: int) -> MessageRows:
    """Returns rows that tell their source and place, in whole numbers that bfloat16 holds; the arguments broadcast."""
    start = (source * 31 + place * 7).reshape(-1, 1)
    return ((start + 3 * jnp.arange(width, dtype=jnp.int32)[None, :]) % 251).astype(jnp.bfloat16)


def _me() -> Array:
    return jax.lax.axis_index(EXPERT).astype(jnp.int32)


def _places(count: int) -> Array:
    return jnp.arange(count, dtype=jnp.int32)


def _of_everyone(message: Message) -> MessageRows:
    """What every source has for this device, in the order of sources."""
    source, row = jnp.divmod(_places(message.peers * message.rows), message.rows)
    return _value(source, _me() * message.rows + row, message.width)


def _plan(message: Message, transport: str) -> tuple[Any, Exchange]:
    """Returns the plan of as many rows for every peer; what a transport's move does not need of it is never computed."""
    dispatch, tokens = DispatchConfig(transport=transport, margin_sigmas=0.0, overlap="none"), message.peers * message.rows
    exchange = make_exchange(dispatch, experts=message.peers, peers=message.peers, tokens=tokens, top_k=1)
    choices = vary((_places(tokens) // message.rows)[:, None])
    return TRANSPORTS[transport].plan(choices, exchange), exchange


def _all_to_all(rows: MessageRows, message: Message) -> MessageRows:
    buffer = rows.reshape(message.peers, message.rows, message.width)
    (arrived,) = TRANSPORTS["all_to_all"].move([buffer], *_plan(message, "all_to_all"))
    return arrived.reshape(rows.shape)


def _ragged(rows: MessageRows, message: Message) -> MessageRows:
    (arrived,) = TRANSPORTS["ragged"].move(rows, *_plan(message, "ragged"))
    return arrived[: rows.shape[0]]


def _all_gather(rows: MessageRows, message: Message) -> MessageRows:
    return TRANSPORTS["all_gather"].move(rows, *_plan(message, "all_gather"))


def _psum_scatter(rows: MessageRows, message: Message) -> MessageRows:
    return TRANSPORTS["all_gather"].move_back(rows, *_plan(message, "all_gather"))


def _all_rows(message: Message) -> MessageRows:
    return _value(_me(), _places(message.peers * message.rows), message.width)


def _few_rows(message: Message) -> MessageRows:
    return _value(_me(), _places(message.rows), message.width)


def _gathered(message: Message) -> MessageRows:
    source, row = jnp.divmod(_places(message.peers * message.rows), message.rows)
    return _value(source, row, message.width)


def _ones_and_zeros(message: Message) -> MessageRows:
    return _all_rows(message) % 2


def _sums(message: Message) -> MessageRows:
    of_everyone = (_of_everyone(message) % 2).reshape(message.peers, message.rows, message.width)
    return jnp.sum(of_everyone.astype(jnp.float32), axis=0).astype(jnp.bfloat16)


def _same(arrived: MessageRows, message: Message) -> MessageRows:
    del message
    return arrived


COLLECTIVES = {
    "all_to_all": {"all_to_all": Collective(_all_rows, _all_to_all, _of_everyone, _same)},
    "ragged": {"ragged_all_to_all": Collective(_all_rows, _ragged, _of_everyone, _same)},
    "all_gather": {
        "all_gather": Collective(
            _few_rows, _all_gather, _gathered, lambda arrived, message: arrived[: message.rows]
        ),
        "psum_scatter": Collective(
            _ones_and_zeros, _psum_scatter, _sums,
            lambda sums, message: jnp.tile(sums / message.peers, (message.peers, 1)),
        ),
    },
}  # fmt: skip


def make_messages(config: Config, devices: int) -> list[Message]:
    """Returns the sizes to measure, none where the study is not asked for.

    Raises:
      ConfigError: one device has nobody to send to.
    """
    if "all_to_all" not in config.bench.studies:
        return []
    require(devices > 1, "bench.studies", "all_to_all", "two devices or more for this study")
    return list(_messages(config, devices))


def measure_bandwidth(config: Config, messages: list[Message], finished: Finished, progress: Progress) -> Rows:
    """Returns a row for each message and collective of `config.bench.transports`, on all devices; those kept are read."""
    rows: Rows = []
    for message in messages:
        key = make_key("bandwidth", message, config.bench.transports, dataclasses.asdict(config.cluster))
        if finished.get(key) is None:
            progress.say(f"{human_bytes(message.bytes)}: compiles, checks and times {', '.join(config.bench.transports)}")
            finished.add(key, list(_measure(message, config)))
        rows += finished.get(key)
        fastest = max(finished.get(key), key=lambda row: row["bus_bytes_per_s"])
        progress.done(
            f"{human_bytes(message.bytes)}: {fastest['collective']} {fastest['bus_bytes_per_s'] / 1e9:.2f} GB/s on the bus"
        )
    return rows


def _messages(config: Config, devices: int) -> Iterator[Message]:
    size = config.bench.smallest_bytes
    while size <= config.bench.largest_bytes:
        values = max(size // 2 // devices, 1)
        rows = max(values // _WIDEST_ROW, 1)
        yield Message(devices, rows, values // rows)
        size *= _GROWTH


def _measure(message: Message, config: Config) -> Iterator[dict]:
    mesh = make_mesh(MeshConfig(1, message.peers), config.cluster, message.peers, some_devices(message.peers))
    kind = mesh.devices.flat[0].platform
    for transport in config.bench.transports:
        check_transport(transport, mesh, "bench.transports")
    collectives = {
        name: one for transport in config.bench.transports for name, one in COLLECTIVES[transport].items()
    }
    # Enough in one program that its launch does not count, not so many that a large one takes seconds.
    repeats = int(np.clip(2**30 // message.bytes, 2, 50)) if kind == "gpu" else 2
    correct = {name: bool(check_delivery(one, message, mesh)()) for name, one in collectives.items()}
    programs = {name: _repeated(one, message, mesh, repeats) for name, one in collectives.items()}
    contenders = {name: Contender(program, jax.block_until_ready) for name, program in programs.items()}
    # The least calls a sample: a number that hangs on the clock would differ between processes, which then wait for ever.
    for name, times in measure_in_turns(contenders, _SAMPLES, sample_seconds=0.0).items():
        seconds = times.median / repeats
        bandwidth = message.bytes / seconds
        yield {
            "collective": name,
            "bytes": message.bytes,
            "devices": message.peers,
            "microseconds": seconds * 1e6,
            "spread": times.spread,
            "algorithm_bytes_per_s": bandwidth,
            "bus_bytes_per_s": bandwidth * (message.peers - 1) / message.peers,
            "correct": correct[name],
            "kind": "emulated" if kind == "cpu" else "measured",
        }


def check_delivery(collective: Collective, message: Message, mesh: Mesh) -> Callable[[], Array]:
    """Returns the jitted question whether every device received just what it should."""

    def on_device() -> Array:
        arrived = collective.move(collective.rows(message), message)
        wrong = jnp.sum(arrived != collective.expected(message), dtype=jnp.int32)
        return jax.lax.psum(vary(wrong), ALL_AXES) == 0

    return jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=(), out_specs=P()))


def _repeated(collective: Collective, message: Message, mesh: Mesh, repeats: int) -> Callable[[], Array]:
    def on_device(rows: MessageRows) -> MessageRows:
        step = lambda _, rows: collective.again(collective.move(rows, message), message)  # noqa: E731
        return jax.lax.fori_loop(0, repeats, step, rows)

    make = jax.jit(jax.shard_map(lambda: vary(collective.rows(message)), mesh=mesh, in_specs=(), out_specs=TOKENS))
    sharded = jax.shard_map(on_device, mesh=mesh, in_specs=TOKENS, out_specs=TOKENS)
    program = jax.jit(sharded, compiler_options=compiler_options(mesh.devices.flat[0].platform))
    rows = make()
    if mesh.devices.flat[0].platform == "cpu":
        # Emulated devices that get many programs ahead wait for one another's threads for ever.
        return lambda: program(rows).block_until_ready()
    return lambda: program(rows)


def as_markdown(result: dict) -> str:
    """Returns the table of a result whose `bandwidth` has the rows."""
    lines = [
        report.heading("Bandwidth of the transports' collectives", result),
        "bfloat16. A message is what a device sends to all, itself included; for all_gather what it ends with, for "
        "psum_scatter what it begins with. Algorithm: message over time; bus: that times (n - 1) / n.",
        " Emulated devices share this machine's memory: no figure here is a network's.\n\n"
        if "emulated" in result["kind"]
        else "\n\n",
        "| message | collective | devices | time | spread | algorithm | bus | correct | kind |\n" + "|---" * 9 + "|\n",
    ]
    for row in result["bandwidth"]:
        lines.append(
            f"| {human_bytes(row['bytes'])} | {row['collective']} | {row['devices']} | {row['microseconds']:.1f} us | "
            f"{row['spread']:.1%} | {row['algorithm_bytes_per_s'] / 1e9:.2f} GB/s | {row['bus_bytes_per_s'] / 1e9:.2f} GB/s | "
            f"{'yes' if row['correct'] else 'NO'} | {row['kind']} |\n"
        )
    return "".join(lines)
