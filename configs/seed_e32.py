"""The reference model, 32 experts a layer, one per GPU: 32 GPUs, EP = 32.

    python -m moe_ep.run --mode=aot --config=configs/seed_e32.py
    python -m moe_ep.run --mode=simulate --config=configs/seed_e32.py

Memory: 54.7 GB of BF16 weights a GPU (experts 30.7, attention 21.1, dense 1.6,
embeddings 1.4); training with Adam needs about 440 GB a GPU and fits no GPU here.

Ragged exchange waits for an XLA that moves it between processes (results/LOG.md, 2026-11-27): on a real
cluster --set dispatch.transport=all_to_all.
"""

from moe_ep.config import ClusterConfig, Config, DispatchConfig, MeshConfig, ModelConfig, MoEConfig, TrainConfig

config = Config(
    model=ModelConfig(moe=MoEConfig(num_experts=32)),
    mesh=MeshConfig(data=1, expert=32),
    dispatch=DispatchConfig(transport="ragged", overlap="auto"),
    cluster=ClusterConfig(gpu="paper_h100", gpus_per_node=8, nics_per_node=8),
    train=TrainConfig(batch_sequences=32, sequence=1024),
)
