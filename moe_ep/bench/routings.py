"""The choices that a timed step makes: drawn and replayed, or the router's own on text."""

from collections.abc import Iterator

import numpy as np

from moe_ep.config import Config, ConfigError
from moe_ep.cost.routing import make_routing
from moe_ep.data import make_dataset

DRAWS = 4  # different batches that a contender's steps go through in turn
OWN_CHOICE = -1


def check_routing(config: Config, routing: str) -> None:
    """Raises ConfigError unless the name is one of "uniform", "zipf:EXPONENT" and "text"."""
    if routing == "text":
        return
    try:
        if routing.split(":")[0] not in ("uniform", "zipf"):
            raise ConfigError("another kind")
        make_routing(routing, config.model.moe.num_experts, config.model.moe.top_k)
    except ConfigError:
        raise ConfigError(
            f"--set bench.routing={routing}: allowed is a list of uniform, zipf:EXPONENT and text"
        ) from None


def draw_choices(config: Config, routing: str, tokens: int) -> Iterator[np.ndarray]:
    """Yields DRAWS arrays int32[layers, tokens, top_k], no expert twice in a token.

    Experts are drawn one after another by the routing's shares (Gumbel top-k); hot
    experts stand at other places in every layer. For "text" each is the router's own.
    """
    moe, layers = config.model.moe, config.model.moe_layers
    shape = (layers, tokens, moe.top_k)
    if routing == "text":
        yield from [np.full(shape, OWN_CHOICE, np.int32)] * DRAWS
        return
    weights = make_routing(routing, moe.num_experts, moe.top_k, config.seed).shares
    log_weights = np.log(weights[np.arange(layers) % len(weights)])[:, None, :]
    random = np.random.default_rng(config.seed)
    for _ in range(DRAWS):
        ranked = log_weights + random.gumbel(size=(layers, tokens, moe.num_experts)).astype(np.float32)
        yield np.argpartition(-ranked, moe.top_k - 1, axis=-1)[..., : moe.top_k].astype(np.int32)


def draw_tokens(config: Config, routing: str, sequences: int, length: int) -> Iterator[np.ndarray]:
    """Yields DRAWS batches int32[sequences, length]: of the run's data for "text", else random ids.

    Raises:
      ConfigError: the data is missing or does not fit the model.
    """
    if routing == "text":
        dataset = make_dataset(
            config.data, vocabulary=config.model.vocabulary, batch_sequences=sequences, sequence=max(length - 1, 1),
            seed=config.seed, split="train",
        )  # fmt: skip
        for _ in range(DRAWS):
            yield next(dataset)[:, :length]
        return
    random = np.random.default_rng(config.seed + 1)
    for _ in range(DRAWS):
        yield random.integers(config.model.vocabulary, size=(sequences, length), dtype=np.int32)
