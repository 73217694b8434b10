"""A row of the benchmark: what one contender did in a cell, under the keys of the JSON result."""

import numpy as np

from moe_ep import metrics
from moe_ep.bench.grid import Cell
from moe_ep.bench.running import Running
from moe_ep.bench.steps import summarize
from moe_ep.bench.work import exchange_bytes, gradient_bytes, least_bytes
from moe_ep.dispatch.exchange import transport_of
from moe_ep.hardware import gpu_of_device_kind


def make_row(cell: Cell, running: Running, routing: str, seconds: np.ndarray, ceilings: dict[str, float]) -> dict:
    """Returns the row of a contender's timed steps; bytes and FLOPs are of one device and one step.

    `ceilings` are the device's as measured, none on emulated ones.
    """
    contender, config = running.contender, running.config
    layout, counted = contender.layout, running.count()
    tokens = cell.tokens_per_microbatch(contender)
    step_ms = summarize(seconds)
    # A sequence waits a step for its token in decode; elsewhere a device's tokens share the step.
    per_token = 1.0 if cell.phase == "decode" else 1.0 / tokens
    tokens_per_s = tokens * layout.devices / step_ms["median"] * 1e3
    device = running.mesh.devices.flat[0]
    gpu = gpu_of_device_kind(device.device_kind)
    flops = metrics.phase_flops_per_token(config.model, cell.phase, cell.context)
    moved = least_bytes(running, cell.phase, counted)
    buffers = counted.rows_sent + counted.rows_padded
    exchanged, gradients = exchange_bytes(running, cell.phase, counted), gradient_bytes(running, cell.phase)
    return {
        "study": cell.study,
        "layout": layout.name,
        "experts": layout.experts,
        "ep": layout.ep,
        "data": layout.data,
        "devices": layout.devices,
        "phase": cell.phase,
        "sequence": cell.context,
        "tokens_per_microbatch": tokens,
        "routing": routing,
        "transport": transport_of(config.dispatch, layout.ep),
        "overlap": config.dispatch.overlap_for(tokens, contender.sequences),
        "chunks": config.dispatch.chunks,
        "loss": running.loss,
        "tokens_per_s": tokens_per_s,
        "ms_per_step": step_ms["median"],
        "ms_per_token_median": step_ms["median"] * per_token,
        "ms_per_token_p95": step_ms["p95"] * per_token,
        "ms_per_token_p99": step_ms["p99"] * per_token,
        "spread": step_ms["spread"],
        "steps_timed": int(seconds.size),
        "mfu": metrics.mfu(tokens_per_s, flops, gpu, layout.devices),
        "flops_per_step": flops * tokens,
        "bytes_sent": exchanged + gradients,
        "exchange_bytes": exchanged,
        "gradient_bytes": gradients,
        "network_bytes_per_s": (exchanged + gradients) / step_ms["median"] * 1e3,
        "least_memory_bytes": moved,
        "memory_bandwidth_utilisation": gpu and moved / step_ms["median"] * 1e3 / gpu.memory_bytes_per_s,
        **_shares(flops * tokens, moved, step_ms["median"] / 1e3, ceilings),
        "bytes_per_device": _memory(running),
        "waves": running.waves,
        "buffer_fill": counted.rows_sent / buffers if buffers else None,
        "rows_dropped": counted.rows_dropped,
        "load_cv": float(metrics.load_cv(counted.expert_counts).mean()),
        "max_over_mean_load": float(metrics.max_over_mean(counted.expert_counts).mean()),
        "kind": "emulated" if device.platform == "cpu" else "measured",
    }


def _shares(flops: float, moved: float, seconds: float, ceilings: dict[str, float]) -> dict[str, float | None]:
    """What of the device's measured product rate and copy bandwidth the step reaches."""
    reached = {"share_of_product": ("product_flops_per_s", flops), "share_of_copy": ("copy_bytes_per_s", moved)}
    return {
        name: amount / seconds / ceilings[ceiling] if ceiling in ceilings else None
        for name, (ceiling, amount) in reached.items()
    }


def _memory(running: Running) -> dict[str, int]:
    """The compiler's own count for the program of one device."""
    analysis = running.compiled.memory_analysis()
    arguments, temporaries = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    outputs = max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
    return {"arguments": arguments, "outputs": outputs, "temporaries": temporaries,
            "total": arguments + outputs + temporaries}  # fmt: skip
