"""One config with every transport and overlap, side by side."""

import dataclasses

from moe_ep.aot.compile import compile_program
from moe_ep.config import Config

# The rows of the page: name, fields of `dispatch` that it sets.
CHOICES = {
    "all_to_all, no overlap": {"transport": "all_to_all", "overlap": "none", "chunks": 1},
    "all_to_all, 2 chunks": {"transport": "all_to_all", "overlap": "chunks", "chunks": 2},
    "all_to_all, 4 chunks": {"transport": "all_to_all", "overlap": "chunks", "chunks": 4},
    "all_to_all, staggered": {"transport": "all_to_all", "overlap": "staggered", "chunks": 1},
    "all_gather, no overlap": {"transport": "all_gather", "overlap": "none", "chunks": 1},
    "ragged, no overlap": {"transport": "ragged", "overlap": "none", "chunks": 1},
    "ragged, staggered": {"transport": "ragged", "overlap": "staggered", "chunks": 1},
}


def compare(config: Config) -> list[dict]:
    """Compiles the config with every transport and overlap; returns bytes, buffers and hidden share of each."""
    return [_row(name, config, fields) for name, fields in CHOICES.items()]


def _row(name: str, config: Config, fields: dict) -> dict:
    changed = dataclasses.replace(config, dispatch=dataclasses.replace(config.dispatch, **fields))
    compiled = compile_program(changed)
    exchanges = [transfer for transfer in compiled.timeline.transfers if transfer.is_exchange]
    return {
        "name": name,
        "sent_bytes_per_gpu": sum(transfer.sent_bytes * transfer.count for transfer in exchanges),
        "exchange_s": sum(transfer.seconds for transfer in exchanges),
        "hidden_share": compiled.timeline.hidden_share(),
        "dispatch_buffers": compiled.memory.by_part.get("dispatch_buffers", 0),
        "temporaries": compiled.memory.temporaries,
        "fits": compiled.memory.fits,
        "predicted_step_s": compiled.timeline.step_s,
    }
