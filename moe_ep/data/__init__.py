"""Token batches: real text or synthetic, deterministic, exactly resumable; no jax.

`make_dataset` is what training calls. The way of a token: `sources` reads files
into documents, `tokenizer` turns them into ids, `corpus` splits and packs them,
`order` shuffles sequences, `dataset` hands out batches.
"""

from moe_ep.data.dataset import Dataset, make_dataset
from moe_ep.data.tokenizer import Tokenizer, make_tokenizer

__all__ = ["Dataset", "Tokenizer", "make_dataset", "make_tokenizer"]
