"""One config with every transport and overlap, side by side."""

from collections.abc import Iterable

from moe_ep.aot.summary import Summarize, dispatch_name
from moe_ep.config import Config
from moe_ep.dispatch import most_chunks
from moe_ep.override import apply
from moe_ep.progress import Progress

# The rows of the page: transport, overlap, chunks.
CHOICES = (
    ("all_to_all", "none", 1),
    ("all_to_all", "chunks", 2),
    ("all_to_all", "chunks", 4),
    ("all_to_all", "staggered", 1),
    ("all_gather", "none", 1),
    ("all_gather", "staggered", 1),
    ("ragged", "none", 1),
    ("ragged", "staggered", 1),
)


def with_dispatch(config: Config, transport: str, overlap: str, chunks: int) -> Config:
    """Returns the config with another way for rows to travel."""
    fields = {"transport": transport, "overlap": overlap, "chunks": chunks}
    return apply(config, [f"dispatch.{name}={value}" for name, value in fields.items()])


def choices_of(config: Config, choices: Iterable[tuple[str, str, int]] = CHOICES) -> list[Config]:
    """Returns the config with each choice that its batch allows: half batches of even sequences, chunks of a row at least."""
    changed = [with_dispatch(config, *choice) for choice in choices]
    return [one for one in changed if _allows_halves(one) and one.dispatch.chunks <= _most_chunks(one)]


def _allows_halves(config: Config) -> bool:
    return config.dispatch.overlap != "staggered" or config.aot.tokens_per_gpu // config.aot.context % 2 == 0


def _most_chunks(config: Config) -> int:
    aot, moe = config.aot, config.model.moe
    tokens = aot.tokens_per_gpu // aot.context if aot.program == "decode" else aot.tokens_per_gpu
    peers = config.mesh.expert or moe.num_experts
    return most_chunks(config.dispatch, experts=moe.num_experts, peers=peers, tokens=tokens, top_k=moe.top_k)


def compare(config: Config, summarize: Summarize, progress: Progress) -> list[dict]:
    """Compiles the config with every transport and overlap that it allows; returns a summary of each."""
    rows = []
    for changed in choices_of(config):
        rows.append(summarize(changed))
        progress.done(f"{config.aot.program}, {dispatch_name(changed)}: {verdict(rows[-1])}")
    return rows


def verdict(row: dict) -> str:
    """Returns in a few words what a summary says: what is hidden, or what is missing."""
    if not row["fits"]:
        return f"does not fit, {row['missing_bytes'] / 1e9:.2f} GB are missing"
    if not row["collectives"]:
        return f"crosses no link, compiled in {row['compile_s']:.0f} s"
    return f"{row['hidden_share']:.1%} hidden (predicted), compiled in {row['compile_s']:.0f} s"
