"""Full-size experts on four GPUs of one node, one a GPU (EP = 4), to time transports and overlaps.

    python -m moe_ep.run --mode=bench --config=configs/four_gpus.py
    python -m moe_ep.run --mode=bench --config=configs/four_gpus.py --set model.layers=3 --set model.unroll=true \
        --set bench.phases=train

Memory a GPU: 11 GB in prefill and decode, 39 GB in training with three layers.
XLA_PYTHON_CLIENT_MEM_FRACTION=0.85 leaves NCCL's buffers room.
"""

from moe_ep.config import (
    AotConfig,
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
        layers=8,
        dense_layers=1,
        attention=AttentionConfig(latent_dim=512, nope_dim=56, rope_dim=64),
        moe=MoEConfig(num_experts=4, top_k=2),
    ),
    mesh=MeshConfig(data=1, expert=4),
    dispatch=DispatchConfig(overlap="none"),
    cluster=ClusterConfig(gpu="h200", nic_gigabits_per_s=400.0),
    aot=AotConfig(tokens_per_gpu=8192, context=2048),
    bench=BenchConfig(
        studies=("dispatch",),
        phases=("prefill", "decode"),
        baselines=(),
        sequences=(2048,),
        tokens_per_gpu=(8192,),
        sequences_per_gpu=(128,),
        routing=("uniform",),
        steps=6,
    ),
)
