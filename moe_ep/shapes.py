"""The alphabet of dimensions and the named array types.

A capital letter is the whole array's size, the small one this device's share of
it; inside shard_map arrays carry small letters. Types are annotations: the tests
check every call of every module against them.

  B b  sequences of a batch           T t  tokens (b x s)
  S s  positions of a sequence        K    experts chosen by a token
  D    model width                    E e  experts of a layer, of a device
  F    hidden width of an MLP         P    devices on the expert axis
  H    attention heads                C    rows of one (source, destination) buffer
  N    head dim without position      R r  rows of an expert buffer
  O    head dim with rotary position  L    layers of a stack
  U    head dim of values             V    vocabulary
  Z    latent of keys and values      W    Z + O, values cached a token and layer
"""

from jax import Array
from jaxtyping import Bool, Float, Float32, Int32

Tokens = Int32[Array, "b s"]
Positions = Int32[Array, "b s"]
Activations = Float[Array, "b s D"]
TokenRows = Float[Array, "t D"]
Rows = Float[Array, "r D"]
Queries = Float[Array, "b s H NO"]
Values = Float[Array, "b s H U"]
Latents = Float[Array, "b s Z"]
RotaryKeys = Float[Array, "b s O"]
Logits = Float32[Array, "b s V"]
RouterLogits = Float32[Array, "t E"]
RouterBias = Float32[Array, "E"]
Choices = Int32[Array, "t K"]
Weights = Float32[Array, "t K"]
ExpertCounts = Int32[Array, "E"]
Scalar = Float32[Array, ""]
Count = Int32[Array, ""]
Mask = Bool[Array, "b s"]
