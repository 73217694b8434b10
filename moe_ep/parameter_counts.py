"""A model's parameters and FLOPs by its config: matrices, as FLOPs count them; norms where it is said."""

from moe_ep.config import Activation, AttentionConfig, ModelConfig


def mlp_parameters(width: int, hidden: int, activation: Activation) -> int:
    """Returns the parameters of one expert or one dense feed-forward layer."""
    return width * hidden * (3 if activation == "silu_gated" else 2)


def attention_parameters(width: int, attention: AttentionConfig) -> int:
    """Returns the parameters of one layer's attention matrices."""
    heads, query_latent = attention.heads, attention.query_latent_dim
    query_out = heads * attention.query_dim
    query = width * query_latent + query_latent * query_out if query_latent else width * query_out
    down = width * attention.cache_dim
    up = attention.latent_dim * heads * (attention.nope_dim + attention.value_dim)
    return query + down + up + heads * attention.value_dim * width


def parameters_by_part(model: ModelConfig) -> dict[str, int]:
    """Returns the whole model's parameters: experts, attention, dense, shared, router, embedding, norm."""
    moe, attention, width = model.moe, model.attention, model.width
    expert = mlp_parameters(width, moe.hidden, moe.activation)
    norms_per_layer = 2 * width + attention.latent_dim + attention.query_latent_dim
    return {
        "experts": model.moe_layers * moe.num_experts * expert,
        "attention": model.layers * attention_parameters(width, attention),
        "dense": model.dense_layers * mlp_parameters(width, model.hidden, model.activation),
        "shared": model.moe_layers * moe.shared_experts * expert,
        "router": model.moe_layers * width * moe.num_experts,
        "embedding": 2 * model.vocabulary * width,
        "norm": model.layers * norms_per_layer + width,
    }


def active_parameters(model: ModelConfig) -> int:
    """Returns the matrix parameters one token meets: top-k experts, and the output head but no embedding row."""
    parts = parameters_by_part(model)
    chosen = parts["experts"] * model.moe.top_k // model.moe.num_experts
    head = model.vocabulary * model.width
    return chosen + parts["attention"] + parts["dense"] + parts["shared"] + parts["router"] + head


def forward_flops_per_token(model: ModelConfig, sequence: int) -> float:
    """Returns the forward FLOPs of one token: 2 a parameter, and causal attention over half the sequence on average."""
    attention = model.attention
    pairs = 2 * model.layers * attention.heads * (attention.query_dim + attention.value_dim) * sequence / 2
    return 2.0 * active_parameters(model) + pairs
