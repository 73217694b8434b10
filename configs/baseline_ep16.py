"""The conventional layout, scaled down: EP = 16 with four experts on each device, on 16 emulated CPU devices.

    scripts/run --config=configs/baseline_ep16.py --devices=16

Memory: about 3 GB of the machine's own. Full-size EP < E does not fit one pipeline
stage's GPU, so at full size this layout is simulated.
"""

import dataclasses

from moe_ep.config import MeshConfig, cpu8_tiny

_small = cpu8_tiny()
_moe = dataclasses.replace(_small.model.moe, num_experts=64)
config = dataclasses.replace(
    _small,
    model=dataclasses.replace(_small.model, moe=_moe),
    mesh=MeshConfig(expert=16),
)
