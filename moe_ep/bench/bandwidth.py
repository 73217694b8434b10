"""Bandwidth of the transports' own collectives over message sizes, in the manner of nccl-tests.

A message is what one device sends to all, itself included (all_to_all, ragged), what
it has after gathering (all_gather), or what it adds up (psum_scatter, the way back of
all_gather). The algorithm's bandwidth is the message over the time; the bus bandwidth
is that times (n - 1) / n, what crosses a device's links (nccl-tests, doc/PERFORMANCE.md).
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import BFloat16

from moe_ep.bench import report
from moe_ep.bench.timing import Contender, measure_in_turns
from moe_ep.config import Config, DispatchConfig, MeshConfig, require
from moe_ep.dispatch import TRANSPORTS, Exchange, make_exchange
from moe_ep.mesh import ALL_AXES, EXPERT, TOKENS, make_mesh, vary
from moe_ep.metrics import human_bytes

_WIDEST_ROW = 1024
_SAMPLES = 7
_GROWTH = 4  # of a message to the next

Rows = BFloat16[Array, "rows D"]


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

    rows: Callable[[Message], Rows]
    move: Callable[[Rows, Message], Array]
    expected: Callable[[Message], Array]
    again: Callable[[Array, Message], Rows]


def _value(source: Array, place: Array, width: int) -> Rows:
    """Returns rows that tell their source and place, in whole numbers that bfloat16 holds; the arguments broadcast."""
    start = (source * 31 + place * 7).reshape(-1, 1)
    return ((start + 3 * jnp.arange(width, dtype=jnp.int32)[None, :]) % 251).astype(jnp.bfloat16)


def _me() -> Array:
    return jax.lax.axis_index(EXPERT).astype(jnp.int32)


def _places(count: int) -> Array:
    return jnp.arange(count, dtype=jnp.int32)


def _of_everyone(message: Message) -> Rows:
    """What every source has for this device, in the order of sources."""
    source, row = jnp.divmod(_places(message.peers * message.rows), message.rows)
    return _value(source, _me() * message.rows + row, message.width)


def _exchange(message: Message, transport: str) -> Exchange:
    dispatch = DispatchConfig(transport=transport, margin_sigmas=0.0, overlap="none")
    return make_exchange(
        dispatch, experts=message.peers, peers=message.peers, tokens=message.peers * message.rows, top_k=1
    )


def _all_to_all(rows: Rows, message: Message) -> Rows:
    buffer = rows.reshape(message.peers, message.rows, message.width)
    (arrived,) = TRANSPORTS["all_to_all"].move([buffer], None, _exchange(message, "all_to_all"))
    return arrived.reshape(rows.shape)


def _ragged(rows: Rows, message: Message) -> Rows:
    exchange = _exchange(message, "ragged")
    choices = vary((_places(rows.shape[0]) // message.rows)[:, None])
    plan = TRANSPORTS["ragged"].plan(choices, exchange)
    (arrived,) = TRANSPORTS["ragged"].move(rows, plan, exchange)
    return arrived[: rows.shape[0]]


def _all_gather(rows: Rows, message: Message) -> Rows:
    return TRANSPORTS["all_gather"].move(rows, None, _exchange(message, "all_gather"))


def _psum_scatter(rows: Rows, message: Message) -> Rows:
    return TRANSPORTS["all_gather"].move_back(rows, None, _exchange(message, "all_gather"))


def _all_rows(message: Message) -> Rows:
    return _value(_me(), _places(message.peers * message.rows), message.width)


def _few_rows(message: Message) -> Rows:
    return _value(_me(), _places(message.rows), message.width)


def _gathered(message: Message) -> Rows:
    source, row = jnp.divmod(_places(message.peers * message.rows), message.rows)
    return _value(source, row, message.width)


def _ones_and_zeros(message: Message) -> Rows:
    return _all_rows(message) % 2


def _sums(message: Message) -> Rows:
    of_everyone = (_of_everyone(message) % 2).reshape(message.peers, message.rows, message.width)
    return jnp.sum(of_everyone.astype(jnp.float32), axis=0).astype(jnp.bfloat16)


def _same(arrived: Rows, message: Message) -> Rows:
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


def measure_bandwidth(config: Config) -> list[dict]:
    """Returns a row for each message size and collective of `config.bench.transports`, on all devices.

    Raises:
      ConfigError: one device has nobody to send to.
    """
    devices = jax.device_count()
    require(devices > 1, "bench.studies", "all_to_all", "two devices or more for this study")
    mesh = make_mesh(MeshConfig(1, devices), config.cluster, devices)
    collectives = {
        name: one for transport in config.bench.transports for name, one in COLLECTIVES[transport].items()
    }
    return [row for message in _messages(config, devices) for row in _measure(message, collectives, mesh)]


def _messages(config: Config, devices: int) -> Iterator[Message]:
    size = config.bench.smallest_bytes
    while size <= config.bench.largest_bytes:
        values = max(size // 2 // devices, 1)
        rows = max(values // _WIDEST_ROW, 1)
        yield Message(devices, rows, values // rows)
        size *= _GROWTH


def _measure(message: Message, collectives: dict[str, Collective], mesh: Mesh) -> Iterator[dict]:
    kind = mesh.devices.flat[0].platform
    # Enough in one program that its launch does not count, not so many that a large one takes seconds.
    repeats = int(np.clip(2**30 // message.bytes, 2, 50)) if kind == "gpu" else 2
    correct = {name: bool(_check(one, message, mesh)()) for name, one in collectives.items()}
    programs = {name: _repeated(one, message, mesh, repeats) for name, one in collectives.items()}
    contenders = {name: Contender(program, jax.block_until_ready) for name, program in programs.items()}
    for name, times in measure_in_turns(contenders, _SAMPLES, 0.0 if kind == "cpu" else 0.02).items():
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


def _check(collective: Collective, message: Message, mesh: Mesh) -> Callable[[], Array]:
    """Returns the jitted question whether every device received just what it should."""

    def on_device() -> Array:
        arrived = collective.move(collective.rows(message), message)
        wrong = jnp.sum(arrived != collective.expected(message), dtype=jnp.int32)
        return jax.lax.psum(vary(wrong), ALL_AXES) == 0

    return jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=(), out_specs=P()))


def _repeated(collective: Collective, message: Message, mesh: Mesh, repeats: int) -> Callable[[], Array]:
    def on_device(rows: Rows) -> Rows:
        step = lambda _, rows: collective.again(collective.move(rows, message), message)  # noqa: E731
        return jax.lax.fori_loop(0, repeats, step, rows)

    make = jax.jit(jax.shard_map(lambda: vary(collective.rows(message)), mesh=mesh, in_specs=(), out_specs=TOKENS))
    program = jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=TOKENS, out_specs=TOKENS))
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
