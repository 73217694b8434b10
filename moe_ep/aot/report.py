"""The reports as text."""

from moe_ep.config import Config

_GB = 1e9


def aot_table(config: Config, result: dict) -> str:
    """Returns memory, collectives and overlap of one compiled program as a page of text."""
    return "\n".join([_headline(config, result), "", *_memory(config, result), "", *_collectives(result), "",
                      *_overlap(config, result)])  # fmt: skip


def _headline(config: Config, result: dict) -> str:
    cluster = config.cluster
    chosen = ", chosen by dispatch.overlap=auto" if config.dispatch.overlap == "auto" else ""
    return (
        f"{result['program']}: {config.aot.tokens_per_gpu} tokens per GPU, context {config.aot.context}, compiled for "
        f"{result['gpus']} x {cluster.gpu} in {result['compile_s']:.1f} s; "
        f"transport {config.dispatch.transport}, overlap {result['overlap']}{chosen}"
    )


def _memory(config: Config, result: dict) -> list[str]:
    sizes = result["bytes_per_gpu"]
    capacity = config.cluster.device.memory_bytes
    verdict = "fits" if result["fits"] else f"does not fit: {result['missing_bytes'] / _GB:.2f} GB are missing"
    rows = [f"  {part.replace('_', ' '):<20} {size / _GB:>9.3f} GB" for part, size in sizes["by_part"].items()]
    return [
        "memory per GPU (compiled)",
        *rows,
        f"  {'outputs':<20} {sizes['outputs'] / _GB:>9.3f} GB",
        f"  {'total':<20} {sizes['total'] / _GB:>9.3f} GB of {capacity / _GB:.0f} GB: {verdict}",
    ]


def _collectives(result: dict) -> list[str]:
    heads = ("collective", "scope", "count", "MB/GPU", "same node", "other node", "groups", "ms each", "exposed", "async")
    lines = ["collectives per step (bytes compiled, sent by one GPU, even routing; times predicted)",
             "  {:<18} {:<34} {:>6} {:>9} {:>9} {:>10} {:>9} {:>8} {:>8} {:>5}".format(*heads)]  # fmt: skip
    for row in result["collectives"]:
        lines.append(
            f"  {row['op']:<18} {row['scope'][-34:]:<34} {row['count']:>6} {row['bytes_per_gpu'] / 1e6:>9.3f} "
            f"{row['bytes_same_node'] / 1e6:>9.3f} {row['bytes_other_node'] / 1e6:>10.3f} "
            f"{row['groups']:>4} x {row['group_size']:<3}{row['predicted_s'] / row['count'] * 1e3:>8.3f} "
            f"{row['exposed_s'] / row['count'] * 1e3:>8.3f} {'yes' if row['asynchronous'] else 'no':>5}"
        )
    return lines


def _overlap(config: Config, result: dict) -> list[str]:
    cluster = config.cluster
    lines = [
        f"predicted step {result['predicted_step_s'] * 1e3:.2f} ms; of dispatch and combine {result['hidden_share']:.1%} "
        f"hidden (bound {result['hidden_share_bound']:.1%}), of all collectives {result['hidden_share_all_collectives']:.1%} "
        f"({cluster.nics_per_node} NICs of {cluster.nic_gigabits_per_s:.0f} Gb/s per node)"
    ]
    if not result["fits"]:
        lines.append("over its memory XLA makes collectives synchronous: the overlap is not that of a program that fits")
    return lines


def coverage_table(timeline) -> str:
    """Returns, for every collective, the work that runs between its start and its done."""
    lines = ["what runs between start and done (predicted ms; the three longest)"]
    for transfer in timeline.transfers:
        longest = sorted(transfer.covered_by, key=lambda work: -work[3])[:3]
        works = ", ".join(f"{op} {scope} {seconds * 1e3:.3f}" for _, op, scope, seconds in longest) or "nothing"
        side = " (backward)" if transfer.backward else ""
        lines.append(f"  {transfer.count:>4} x {transfer.scope or transfer.op}{side}: {works}")
    return "\n".join(lines)


def comparison_table(rows: list[dict]) -> str:
    """Returns the transports side by side."""
    lines = ["transports compared (bytes and buffers compiled, times predicted)",
             f"  {'transport':<26} {'sent/GPU':>10} {'exchange':>10} {'hidden':>7} {'buffers':>9} "
             f"{'temporaries':>12} {'step':>10}"]  # fmt: skip
    for row in rows:
        lines.append(
            f"  {row['name']:<26} {row['sent_bytes_per_gpu'] / _GB:>7.3f} GB {row['exchange_s'] * 1e3:>7.2f} ms "
            f"{row['hidden_share']:>7.1%} {row['dispatch_buffers'] / _GB:>6.3f} GB {row['temporaries'] / _GB:>9.3f} GB "
            f"{row['predicted_step_s'] * 1e3:>7.2f} ms" + ("" if row["fits"] else "  does not fit")
        )
    return "\n".join(lines)


def limits_line(limits: dict) -> str:
    """Returns the largest sizes that fit."""
    return (
        f"most that fits: {limits['tokens_per_gpu']} tokens per GPU at context {limits['at_context']}; "
        f"context {limits['context']} with {limits['at_sequences']} sequences per GPU"
    )
