"""Full-size experts on one 141 GB GPU: 8 experts a layer, EP = 1, trained with AdamW.

    python -m moe_ep.run --config=configs/single_gpu.py --set data.path=TEXT_OR_JSONL

Memory: 5.7 G parameters x 16 bytes (float32 weights, gradients, Adam's moments) = 92 GB,
and the activations of 24,576 tokens; set train.checkpoint_every to save (69 GB each).

XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 leaves the GPU to this process.
"""

from moe_ep.config import (
    AttentionConfig,
    BalanceConfig,
    ClusterConfig,
    Config,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    TrainConfig,
)

config = Config(
    model=ModelConfig(
        layers=3,
        dense_layers=1,
        remat="none",
        unroll=True,
        embedding_scale=1.0,  # or bytes look alike to the router, and two experts take nearly all
        attention=AttentionConfig(latent_dim=512, nope_dim=56, rope_dim=64),
        moe=MoEConfig(num_experts=8, top_k=2),
    ),
    mesh=MeshConfig(data=1, expert=1),
    cluster=ClusterConfig(gpu="h200", nic_gigabits_per_s=400.0),
    balance=BalanceConfig(rate=0.05),
    train=TrainConfig(
        steps=100,
        batch_sequences=12,  # the update and the casts, 46 ms, are paid once a step
        sequence=2048,
        checkpoint_every=0,
        sample_tokens=0,
        optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=30),
    ),
)
