"""Absorbed attention of one new token a sequence over the cache of latents."""

from moe_ep.kernels.mla_decode.api import IMPLEMENTATIONS as IMPLEMENTATIONS
from moe_ep.kernels.mla_decode.api import mla_decode as mla_decode
