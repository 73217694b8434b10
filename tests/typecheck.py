"""The checker behind every annotation of moe_ep in the tests: a whole number passes for a float (PEP 484)."""

import beartype

checked = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
