"""Claims of the reference experiment that depend on neither reading of its network: loads, bytes, sizes."""

import dataclasses

import numpy as np

from moe_ep.config import Config
from moe_ep.parameter_counts import mlp_parameters, parameters_by_part
from moe_ep.cost.memory import parameters_per_gpu, total
from moe_ep.cost.micro_batch import MicroBatchPlan, largest_micro_batch
from moe_ep.cost.network import gather_seconds
from moe_ep.cost.routing import buffer_rows
from moe_ep.simulate.balancing import Balanced, balance
from moe_ep.simulate.from_config import ASSUMED, with_batch
from moe_ep.simulate.layer import layer_load
from moe_ep.simulate.memory import memory_of, plan_of
from moe_ep.simulate.reference import FORMULA, NO_CLAIM, NOT, REPRODUCED, Row, Setting, routing, row, span
from moe_ep.simulate.scenario import own_stack
from moe_ep.simulate.step import compute_seconds, stage_work


def load_variance(config: Config) -> Row:
    """Less than 5 % variance of expert load."""
    values = {}
    for name, spec, tokens in (("512 tokens/GPU", "uniform", 512), ("32 tokens/GPU", "uniform", 32),
                               ("Zipf 0.3, 512", "zipf:0.3", 512)):  # fmt: skip
        counts = routing(spec, 128, 2).counts(0, tokens, 128, 2).sum(axis=0)
        values[name] = counts.std() / counts.mean()
    value = "; ".join(f"{name}: CV {cv:.1%}" for name, cv in values.items())
    return row("variance of expert load", "under 5 %", None, "E = 128, top-2, 128 GPUs, drawn at random", value,
                "reproduced only if 512 uniform random tokens/GPU", "simulated")  # fmt: skip


def busiest_gpu(config: Config) -> Row:
    """Pooling: several experts a GPU average their load."""
    setting = Setting(config, "NIC per GPU", False)
    parts = []
    for spec in ("uniform", "zipf:0.3", "zipf:0.6"):
        loads = []
        for ep in (128, 8):
            scenario = setting.scenario(128, ep, "prefill", 128)
            scenario = dataclasses.replace(scenario, routing=routing(spec, 128, 2))
            loads.append(np.mean([layer_load(scenario, layer, 128).max_over_mean for layer in range(4)]))
        parts.append(f"{spec}: {loads[0]:.2f} with one expert a GPU, {loads[1]:.2f} with 16")
    inputs = "busiest GPU over the mean, E = 128, 128 tokens/GPU"
    verdict = f"{NO_CLAIM}: under skew the balancer decides"
    return row("one expert per GPU loses pooling", "not stated", None, inputs, "; ".join(parts), verdict, "simulated")


def balancing_rate(config: Config) -> Row:
    """alpha = 0.01 every 100 ms: on softmax scores as they are, and in units of their mean, as this project reads it."""
    setting, parts, settled = Setting(config, "NIC per GPU", False), [], {}
    for experts in (16, 128):
        raw = balance(experts, 2, 8192, 0.01, updates=60)
        ours = balance(experts, 2, 8192, 0.01 / experts, updates=600)
        settled[experts] = raw.settled <= 1.1 * raw.floor
        scaled = f"in units of the mean score {_loads(ours)}, after 600"
        parts.append(f"E={experts}: {_loads(raw)}, after 60 updates; {scaled}")
    step_ms = 1e3 * setting.step_s(setting.scenario(128, 128, "decode", 32))
    parts.append(f"100 ms are {max(round(100 / step_ms), 1)} steps of {step_ms:.0f} ms (decode, 32 sequences a GPU, E = 128)")
    kept = [f"E={experts}" for experts, enough in settled.items() if enough]
    verdict = REPRODUCED if all(settled.values()) else f"reproduced only if {', '.join(kept)}" if kept else NOT
    inputs = "top-2 of softmax scores, 8192 tokens in all, popularity of 0.5 in the logits; busiest expert over the mean"
    return row("balancing rate", "0.01 every 100 ms", None, inputs, "; ".join(parts), verdict, "simulated")


def _loads(load: Balanced) -> str:
    return f"{load.settled:.2f}, at worst {load.peak:.2f} (before {load.unbalanced:.2f}, drawn evenly {load.floor:.2f})"


def cached_sequences(config: Config) -> Row:
    """The KV cache limits long sequences."""
    setting = Setting(config, "NIC per GPU", False)
    counts = {}
    for name, split in (("attention replicated", False), ("attention split in the node", True)):
        scenario = setting.scenario(128, 128, "decode", 1, 8192)
        layout = dataclasses.replace(scenario.layout, split_attention_weights=split)
        scenario = dataclasses.replace(scenario, layout=layout)
        memory = scenario.fabric.gpu.memory_bytes
        counts[name] = max((n for n in range(1, 64) if total(memory_of(with_batch(scenario, n))) <= memory), default=0)
    value = "; ".join(f"{name}: {count} sequences" for name, count in counts.items())
    inputs = "sequences of 8192 tokens a GPU, E = 128, one expert a GPU"
    return row("KV cache limits long sequences", "yes", None, inputs, value, REPRODUCED, FORMULA)


def weights_held(config: Config) -> Row:
    """The model fits 64 GB."""
    scenario = Setting(config, "NIC per GPU", False).scenario(128, 128, "prefill", 1)
    parts = parameters_per_gpu(plan_of(scenario))
    held = memory_of(scenario)["weights"]
    value = ", ".join(f"{name} {2 * parts[name] / 1e9:.2f}" for name in ("experts", "attention", "dense", "embedding"))
    value += f" GB; with the float32 router {held / 1e9:.1f} GB"
    verdict = REPRODUCED if held <= scenario.fabric.gpu.memory_bytes else NOT
    return row("one expert per GPU fits the GPU", "64 GB", None, "BF16, attention replicated, any E = GPUs", value,
                verdict, FORMULA)  # fmt: skip


def baseline_held(config: Config) -> Row:
    """The conventional EP = 4, 8, 16 at full size."""
    setting = Setting(config, "NIC per GPU", False)
    limit, values, fits = config.cluster.device.memory_bytes, [], []
    for experts, ep in ((16, 4), (16, 8), (32, 16), (128, 16), (128, 8)):
        scenario = setting.scenario(experts, ep, "prefill", 1)
        held = 2 * parameters_per_gpu(plan_of(scenario))["experts"]
        weights = memory_of(scenario)["weights"]
        values.append(f"E={experts}, EP {ep}: {held / 1e9:.1f} GB of experts, {weights / 1e9:.1f} GB in all")
        fits.append(weights <= limit)
    verdict = REPRODUCED if all(fits) else f"{NOT}: no EP below E fits at full size" if not any(fits) else (
        "reproduced only if EP is close to E")  # fmt: skip
    return row("EP 4, 8, 16 as baseline", "several experts a GPU", None, f"weights, BF16, of {limit / 1e9:.0f} GB",
                "; ".join(values), verdict, FORMULA)  # fmt: skip


def micro_batch(config: Config) -> Row:
    """512 to 4096 tokens, adjusted to the memory that is free."""
    setting, parts, sizes = Setting(config, "NIC per GPU", False), [], []
    for context in (512, 2048, 8192):
        for split in (False, True):
            scenario = setting.scenario(128, 128, "prefill", 1, context)
            layout = dataclasses.replace(scenario.layout, split_attention_weights=split)
            weights = memory_of(dataclasses.replace(scenario, layout=layout))["weights"]
            plan = MicroBatchPlan(scenario.model, context, active_experts=1, peers=128, margin_sigmas=5.0)
            sizes.append(largest_micro_batch(plan, scenario.fabric.gpu.memory_bytes - weights))
            parts.append(f"context {context}, attention {'split' if split else 'replicated'}: {sizes[-1]:,}")
    verdict = REPRODUCED if min(sizes) >= 512 else NOT
    return row("micro-batch", "512 to 4096 tokens", None, "the largest of that range that fits beside the weights, its "
                "cache included, E = 128", "; ".join(parts), verdict, FORMULA)  # fmt: skip


def cache_bytes(config: Config) -> Row:
    """14.3 kB of keys and values a token."""
    model, attention = config.model, config.model.attention
    keys = 2 * attention.heads * attention.query_dim
    latent = 2 * attention.cache_dim
    value = (
        f"K alone of one layer {keys / 1e3:.1f} kB; the latent of one layer {latent / 1e3:.1f} kB, "
        f"of all {model.layers} layers {latent * model.layers / 1e3:.0f} kB"
    )
    return row("cache of a token", "14.3 kB", None, "BF16, latent 3584 and a rotary key of 16", value,
                f"{NOT}: K alone, one layer, uncompressed", FORMULA)  # fmt: skip


def training_held(config: Config) -> Row:
    """Training at full size."""
    parts = parameters_by_part(config.model)
    one = parts["experts"] / config.model.moe.num_experts * 16 / 1e9
    rest = (sum(parts.values()) - parts["experts"]) * 16 / 1e9
    inputs = "float32 master, two moments, gradient: 16 bytes a parameter; one expert a GPU"
    value = f"experts {one:.0f} GB, with all else replicated {one + rest:.0f} GB"
    return row("full-size training", "trained", None, inputs, value, f"{NOT}: does not fit 64 GB", FORMULA)


def expert_bytes(config: Config) -> Row:
    """264 MB per expert."""
    model = config.model
    count = mlp_parameters(model.width, model.moe.hidden, model.moe.activation)
    inputs, value = "two matrices 7168 x 18432, BF16", f"{count * 2 / 1e6:.0f} MB; one matrix {count / 1e6:.0f} MB"
    return row("bytes of an expert", "264 MB", None, inputs, value, f"{NOT}: one of the two matrices", FORMULA)


def compression(config: Config) -> Row:
    """KV compression of about 4x."""
    attention = config.model.attention
    full = attention.heads * (attention.query_dim + attention.value_dim)
    return row("KV compression", "about 4x", None, f"{full} values against {attention.cache_dim} a token and layer",
                f"{full / attention.cache_dim:.2f}x", REPRODUCED, FORMULA)  # fmt: skip


def peer_buffers(config: Config) -> Row:
    """64 MB per peer."""
    rows = buffer_rows(2048, 2, 128, 5.0)
    pooled = 2 * 128 * rows * config.model.width * 2
    inputs = "127 peers; here C = mean + 5 sqrt(mean) + 1 rows a pair at 2048 tokens/GPU, sent and received"
    value = f"{127 * 64e6 / 1e9:.1f} GB against {pooled / 1e9:.2f} GB"
    verdict = "reproduced only if every peer has a buffer of its own: pooled they need far less"
    return row("communication buffers", "64 MB per peer", None, inputs, value, verdict, FORMULA)


def split_attention(config: Config) -> Row:
    """Attention weights gathered in the node, or over all GPUs."""
    setting = Setting(config, "NIC per GPU", True)
    scenario = setting.scenario(128, 128, "prefill", 2048)
    layer_bytes = parameters_by_part(config.model)["attention"] / config.model.layers * 2
    near = gather_seconds(layer_bytes, 8, scenario.fabric, ASSUMED.network)
    slow = layer_bytes * 127 / 128 / (scenario.fabric.nic_bytes_per_s * ASSUMED.network.nic_efficiency)
    compute = compute_seconds(stage_work(scenario), 1) / config.model.moe_layers
    inputs = f"{layer_bytes / 1e6:.0f} MB a layer, source's constants, 200 Gb/s per GPU"
    value = (
        f"in the node {1e3 * near:.1f} ms; over all 128, each through its NIC, {1e3 * slow:.0f} ms "
        f"against {1e3 * compute:.0f} ms of compute"
    )
    verdict = f"{NO_CLAIM}: split inside the node, never over all"
    return row("attention weights split", "not stated", None, inputs, value, verdict, "simulated")


def measured_products(config: Config) -> Row:
    """MFU of 60 %, of the experts' products alone."""
    shares = [row.utilisation for row in own_stack().kernels.rows if "gemm" in row.op and row.shape[0] >= 512
              and row.dtype == "bf16"]  # fmt: skip
    inputs = "one H200, warm, 512 to 8192 rows a group, 1 to 16 groups of 7168 x 18432; of 989 TFLOP/s"
    verdict = REPRODUCED if min(shares) >= 0.595 else NOT
    return row("MFU of the experts' products", "60 %", None, inputs, span(shares, "{:.0%}"), verdict, "measured")


def measured_memory(config: Config) -> Row:
    """Memory bandwidth used to 80 %, by single kernels."""
    rows = own_stack().kernels.rows
    products = [row.utilisation for row in rows if "gemm" in row.op and row.shape[0] <= 64]
    (one_pass,) = (row.utilisation for row in rows if row.op == "memory")
    gathers = [row.utilisation for row in rows if row.op == "row_gather"]
    value = f"expert weights read in decode {span(products, '{:.0%}')}; rows moved by index {span(gathers, '{:.0%}')}; "
    value += f"a pass of XLA's {one_pass:.0%}"
    enough = sum(share >= 0.79 for share in products)
    verdict = REPRODUCED if min([*products, *gathers, one_pass]) >= 0.79 else (
        f"reproduced only if expert weights are read in decode, {enough} of {len(products)} sizes")  # fmt: skip
    return row("memory bandwidth of single kernels", "80 %", None, "one H200, of 4.8 TB/s", value, verdict, "measured")


CLAIMS = (
    measured_products, measured_memory, load_variance, balancing_rate, busiest_gpu, cached_sequences, weights_held,
    baseline_held, training_held, micro_batch, expert_bytes, cache_bytes, compression, peer_buffers, split_attention,
)  # fmt: skip
