"""What a layer does, by hand: attention over whole pages, passes of this project's programs, kernels that do little."""

from moe_ep.config import AttentionConfig, ModelConfig, MoEConfig
from moe_ep.cost import program, work

MODEL = ModelConfig(
    width=32,
    attention=AttentionConfig(heads=4, nope_dim=6, rope_dim=2, value_dim=6, latent_dim=16),
    moe=MoEConfig(num_experts=4, hidden=64),
)


def test_a_chunk_over_pages_expands_and_scores_all_that_they_hold():
    """Two sequences of 8 tokens; pages of 12 each: 24 rows expanded, every query with 12 keys and no causal half."""
    plain, paged = (work.attention_prefill(MODEL, 16, 8, work.BF16, 1, 8, keys) for keys in (0, 12))
    flops = [call.flops for call in plain + paged if call.op == "attention"]
    assert flops == [16 * 4 * 2 * (8 + 8) * 8 / 2, 16 * 4 * 2 * (8 + 8) * 12]
    expanded = [[call.shape[0] for call in calls if call.op == "gemm" and call.shape[1] == 16] for calls in (plain, paged)]
    assert expanded == [[16], [24]]


def test_values_are_padded_where_keys_are_and_cut_where_queries_are():
    padded, cut = program.prefill_passes(MODEL, tokens=16, expanded=24, tp=1)
    assert (padded.bytes, cut.bytes) == (24 * 4 * 2 * (6 + 8), 16 * 4 * 2 * 2 * 6)


def test_products_of_one_row_read_their_half_of_the_up_projection_where_it_stands():
    one, two = (program.decode_passes(MODEL, sequences, 0, 1)[0].bytes for sequences in (1, 2))
    assert (one, two) == (0, 2 * 2 * 4 * 16 * (6 + 6))


def test_fixed_buffers_cost_more_the_emptier_they_are():
    full, half = (program.exchange_passes(MODEL, rows, 100)[0].bytes for rows in (100, 50))
    assert full == (100 + 100) * 64
    assert half == (50 + 100 + 4 * 50) * 64


def test_a_routed_layer_has_more_small_kernels_than_a_dense_one():
    for phase in ("prefill", "decode", "train"):
        assert program.small_kernels(phase, routed=True) > 2 * program.small_kernels(phase, routed=False)


def test_an_update_moves_what_adam_and_the_casts_need():
    """Three float32 arrays read and written, a BF16 gradient read twice; float32 read and BF16 written for the products."""
    assert program.update_bytes(1, summed=False) == 24 + 2 * 2 + 6
