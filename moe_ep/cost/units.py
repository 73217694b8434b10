"""The type of a quantity that may be whole or not: bytes, rows, tokens, seconds."""

Number = int | float
