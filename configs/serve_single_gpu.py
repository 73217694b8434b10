"""Full-size experts served from one 141 GB GPU: 8 experts a layer, EP = 1, 24 layers in BF16.

    python -m moe_ep.run --mode=bench --config=configs/serve_single_gpu.py

Memory: 54 G parameters x 2 bytes = 108 GB of weights, and 3.6 GB for the caches of 32
sequences of 4096 tokens; --set model.layers=14 fits 80 GB.

XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 leaves the GPU to this process.
"""

from moe_ep.config import (
    AttentionConfig,
    BenchConfig,
    ClusterConfig,
    Config,
    DispatchConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
)

config = Config(
    model=ModelConfig(
        layers=24,
        dense_layers=1,
        attention=AttentionConfig(latent_dim=512, nope_dim=56, rope_dim=64),
        moe=MoEConfig(num_experts=8, top_k=2),
    ),
    mesh=MeshConfig(data=1, expert=1),
    dispatch=DispatchConfig(overlap="none"),
    cluster=ClusterConfig(gpu="h200", nic_gigabits_per_s=400.0),
    bench=BenchConfig(
        studies=("layouts",),
        phases=("prefill", "decode"),
        sequences=(1024, 4096),
        tokens_per_gpu=(8192,),
        sequences_per_gpu=(8, 32),
        routing=("uniform",),
        steps=10,
        profile=True,
    ),
)
