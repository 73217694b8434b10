"""Which experts tokens choose: shares from uniform to a recorded trace, and rows between GPUs."""

import dataclasses
import functools
import json
import math

import numpy as np

from moe_ep.config import ConfigError, ModelConfig, MoEConfig
from moe_ep.cost.units import Number
from moe_ep.placement import Placement

_LAYERS_SAMPLED = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Routing:
    """How choices fall. Equal only to itself, so that what is drawn from it can be cached.

    Attributes:
      shares: [layers, experts], each expert's share of a layer's assignments; a layer sums to 1.
      sampled: counts are drawn at random; False: counts are exactly the shares.
      together: [experts, experts] from a trace, how often two experts share a token; else None.
      busiest: load of the busiest device over the mean, imposed after placement (what a
        balancer leaves in live traffic); None: it comes out of shares and placement.
    """

    name: str
    shares: np.ndarray
    sampled: bool
    together: np.ndarray | None = None
    busiest: Number | None = None

    def counts(self, layer: int, tokens: Number, sources: int, top_k: int, seed: int = 0) -> np.ndarray:
        """Returns rows from each source to each expert, [sources, experts]; each source sums to tokens x top_k."""
        share = self.shares[layer % len(self.shares)]
        assignments = tokens * top_k
        if not self.sampled:
            return np.tile(share * assignments, (sources, 1))
        generator = np.random.default_rng((seed, layer, sources))
        return generator.multinomial(round(assignments), share, size=sources).astype(float)


def make_routing(spec: str, num_experts: int, top_k: int, seed: int = 0) -> Routing:
    """Builds routing from its name.

    Args:
      spec: "balanced" (every expert exactly its share), "uniform" (random, equal
        probabilities), "zipf:EXPONENT" (share of the i-th expert as i^-EXPONENT),
        "power_law:ALPHA" (shares drawn with density x^-ALPHA), "histogram:FILE" (JSON: a list of counts, or one per
        layer), "trace:FILE" (.npy of int [tokens, top_k] or [layers, tokens, top_k]).

    Raises:
      ConfigError: an unknown name or a file that does not fit the model.
    """
    kind, _, argument = spec.partition(":")
    equal = np.full((1, num_experts), 1 / num_experts)
    if kind == "balanced":
        return Routing(spec, equal, sampled=False)
    if kind == "uniform":
        return Routing(spec, np.tile(equal, (_LAYERS_SAMPLED, 1)), sampled=True)
    if kind == "zipf":
        return Routing(spec, _zipf(_number(argument, spec), num_experts, top_k, seed), sampled=True)
    if kind == "power_law":
        return Routing(spec, _power_law(_number(argument, spec), num_experts, top_k, seed), sampled=True)
    if kind in ("histogram", "trace"):
        return _recorded(kind, argument, spec, num_experts)
    raise _wrong(spec)


def _wrong(spec: str) -> ConfigError:
    return ConfigError(
        f"--set simulate.routing={spec}: allowed is balanced, uniform, zipf:EXPONENT, "
        "power_law:ALPHA (numbers from 0 to below 10), histogram:FILE or trace:FILE"
    )


def _number(text: str, spec: str) -> Number:
    try:
        value = float(text)
    except ValueError:
        raise _wrong(spec) from None
    if not 0 <= value < 10:
        raise _wrong(spec)
    return value


def _zipf(exponent: Number, num_experts: int, top_k: int, seed: int) -> np.ndarray:
    """Shares as rank^-exponent, hot experts at random places of each layer."""
    share = capped(np.arange(1, num_experts + 1) ** -exponent, top_k)
    generator = np.random.default_rng(seed)
    return np.stack([share[generator.permutation(num_experts)] for _ in range(_LAYERS_SAMPLED)])


def _power_law(alpha: Number, num_experts: int, top_k: int, seed: int) -> np.ndarray:
    """Shares drawn from a power law bounded to four decades, a draw a layer (the form that AIConfigurator assumes)."""
    uniform = np.random.default_rng(seed).uniform(size=(_LAYERS_SAMPLED, num_experts))
    if abs(alpha - 1) < 1e-9:
        drawn = 10 ** (4 * uniform)
    else:
        low, high = 1.0, 10 ** (4 * (1 - alpha))
        drawn = (low + uniform * (high - low)) ** (1 / (1 - alpha))
    return np.stack([capped(layer, top_k) for layer in drawn])


def capped(weights: np.ndarray, top_k: int) -> np.ndarray:
    """Returns weights normalised to 1 with none over 1 / top_k: a token chooses an expert at most once."""
    share = weights / weights.sum()
    while share.max() > 1 / top_k + 1e-12:
        full = share >= 1 / top_k - 1e-12
        rest = share[~full].sum()
        share = np.where(full, 1 / top_k, share * ((1 - full.sum() / top_k) / max(rest, 1e-300)))
    return share


def _recorded(kind: str, path: str, spec: str, num_experts: int) -> Routing:
    """Reads counts, or counts the choices of a trace, in which pairs are seen too."""
    flag = f"--set simulate.routing={spec}"
    try:
        data = np.load(path) if kind == "trace" else np.asarray(json.loads(open(path).read()), dtype=float)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{flag}: allowed is a readable file of numbers ({error})") from error
    counts, together = data, None
    if kind == "trace":
        layers = data[None] if data.ndim == 2 else data
        whole = np.issubdtype(data.dtype, np.integer) and layers.ndim == 3 and layers.size
        if not whole or layers.min() < 0 or layers.max() >= num_experts:
            raise ConfigError(f"{flag}: allowed is int [layers, tokens, top_k] from 0 to {num_experts - 1}, at least one token")
        if (np.diff(np.sort(layers, axis=-1), axis=-1) == 0).any():
            raise ConfigError(f"{flag}: allowed is a trace whose tokens choose an expert at most once")
        counts = np.stack([np.bincount(layer.reshape(-1), minlength=num_experts) for layer in layers]).astype(float)
        together = _pairs(layers, num_experts)
    counts = np.atleast_2d(counts)
    if counts.ndim != 2 or counts.shape[1] != num_experts:
        raise ConfigError(f"{flag}: allowed is {num_experts} counts a layer, not {counts.shape[-1]}")
    if not np.isfinite(counts).all() or counts.min() < 0 or (counts.sum(axis=1) == 0).any():
        raise ConfigError(f"{flag}: allowed is counts of zero and more, not all zero in a layer")
    return Routing(spec, counts / counts.sum(axis=1, keepdims=True), sampled=True, together=together)


def _pairs(layers: np.ndarray, num_experts: int) -> np.ndarray:
    chosen = np.zeros((layers.shape[0] * layers.shape[1], num_experts))
    np.put_along_axis(chosen, layers.reshape(-1, layers.shape[2]), 1.0, axis=1)
    return chosen.T @ chosen


def chances_met(share: np.ndarray, tokens: Number, top_k: int) -> np.ndarray:
    """Returns for each expert the probability that one of so many tokens chose it, [experts]; a token's are distinct."""
    return 1 - (1 - np.minimum(top_k * share, 1.0)) ** tokens


def most_met(chances: np.ndarray) -> Number:
    """Returns the expected number of experts met on the device that has most of them.

    Args:
      chances: [devices, slots], the probability that each is met; they count as independent.
    """
    devices, slots = chances.shape
    counts = np.zeros((devices, slots + 1))  # the probability of each number of them
    counts[:, 0] = 1.0
    for slot in range(slots):
        chance = chances[:, slot, None]
        counts = counts * (1 - chance) + np.roll(counts, 1, axis=1) * chance
    at_most = np.cumsum(counts, axis=1).prod(axis=0)
    return float(slots - at_most[:-1].sum())


def rows_between(counts: np.ndarray, placement: Placement) -> np.ndarray:
    """Returns rows that each source sends to each device, [sources, devices]."""
    per_slot = counts[:, placement.slots] / placement.replicas[placement.slots]
    return per_slot.sum(axis=2)


def with_busiest(rows: np.ndarray, busiest: Number) -> np.ndarray:
    """Returns rows whose fullest destination takes `busiest` times the mean, the others sharing the rest."""
    received = rows.sum(axis=0)
    hot = int(np.argmax(received))
    target = np.full(len(received), received.sum() * (1 - busiest / len(received)) / max(len(received) - 1, 1))
    target[hot] = received.sum() * busiest / len(received)
    return rows * (target / np.maximum(received, 1e-300))


def buffer_rows(tokens: Number, top_k: int, peers: int, margin_sigmas: Number) -> int:
    """Returns C, the rows of one (source, destination) buffer: mean + margin sqrt(mean) + 1."""
    mean = tokens * top_k / peers
    return math.floor(mean + margin_sigmas * math.sqrt(mean)) + 1


def nodes_reached(model: ModelConfig, share: np.ndarray, placement: Placement, devices_per_node: int) -> np.ndarray:
    """Returns the probability that a token has at least one expert on each node, [nodes].

    Choices count as independent draws from the shares; where no expert is replicated the
    result is scaled so that equal shares give the exact probability: draws without
    replacement, and from the kept groups only where routing is limited to groups.
    """
    nodes = max(placement.devices // devices_per_node, 1)
    moe = model.moe
    held = (placement.slots.reshape(nodes, -1)[:, :, None] == np.arange(moe.num_experts)).sum(axis=1)
    per_node = held / placement.replicas  # [nodes, experts]
    reached = 1 - (1 - np.clip(per_node @ share, 0, 1)) ** moe.top_k
    if placement.replicas.max() > 1:
        return reached
    equal = 1 - (1 - per_node.mean(axis=1)) ** moe.top_k
    return np.clip(reached * _exactly(moe, held, equal) / equal, 0, 1)


def _exactly(moe: MoEConfig, held: np.ndarray, independent: np.ndarray) -> np.ndarray:
    """The same with equal shares, counted exactly where every node holds whole groups or equal parts of one."""
    width = moe.num_experts // moe.groups
    per_group = held.reshape(len(held), moe.groups, width).sum(axis=2)
    even = all(len(np.unique(row[row > 0])) == 1 for row in per_group)
    if not even:
        return independent
    return np.array([_hit(moe, int((row > 0).sum()), int(row.max())) for row in per_group])


@functools.lru_cache(maxsize=4096)
def _hit(moe: MoEConfig, groups_on_node: int, experts_of_group: int) -> Number:
    """The probability that one of top_k experts, drawn from the kept groups, is on the node."""
    kept, others = moe.groups_kept, moe.groups - groups_on_node
    pool = kept * (moe.num_experts // moe.groups)
    total = 0.0
    for chosen in range(max(0, kept - others), min(groups_on_node, kept) + 1):
        ways = math.comb(groups_on_node, chosen) * math.comb(others, kept - chosen) / math.comb(moe.groups, kept)
        total += ways * (1 - _none(pool, chosen * experts_of_group, moe.top_k))
    return total


@functools.lru_cache(maxsize=4096)
def _none(pool: int, marked: int, draws: int) -> Number:
    """The probability that no marked one is among `draws` of `pool`, drawn without replacement."""
    if draws > pool - marked:
        return 0.0
    return math.comb(pool - marked, draws) / math.comb(pool, draws)
