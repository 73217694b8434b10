"""The default: 8 experts on 8 emulated CPU devices, one per device, trained on real English text.

    scripts/run
    python -m moe_ep.run --devices=8 --config=configs/cpu8_tiny.py

Memory: about 2 GB of the machine's own, all devices together.
"""

from moe_ep.config import cpu8_tiny

config = cpu8_tiny()
