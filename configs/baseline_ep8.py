"""The conventional layout, scaled down: EP = 8 with four experts on each device, on 8 emulated CPU devices.

    scripts/run --config=configs/baseline_ep8.py --devices=8

Memory: about 3 GB of the machine's own. Full-size EP < E does not fit one pipeline
stage's GPU, so at full size this layout is simulated.
"""

import dataclasses

from moe_ep.config import MeshConfig, cpu8_tiny

_small = cpu8_tiny()
_moe = dataclasses.replace(_small.model.moe, num_experts=32)
config = dataclasses.replace(
    _small,
    model=dataclasses.replace(_small.model, moe=_moe),
    mesh=MeshConfig(expert=8),
)
