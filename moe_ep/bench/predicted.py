"""The full-size comparison that no machine here can run, by the simulator."""

import dataclasses

from moe_ep.config import Config
from moe_ep.simulate import validation
from moe_ep.simulate.predict import Prediction, predict
from moe_ep.simulate.reference import READINGS, Setting
from moe_ep.simulate.scenario import Scenario

_EXPERTS = (16, 32, 64, 128)
_BATCHES = {"prefill": 2048, "decode": 8}  # tokens, or sequences, of a GPU
_CONTEXT = 1024


def predict_full_size(config: Config) -> list[dict]:
    """Returns rows of the reference model on the config's cluster, on as many GPUs as experts.

    The proposed layout stands beside each baseline EP degree, twice where it leaves
    GPUs over: as a pipeline, which may fit, and as replicas, whose memory is ignored
    where they do not.
    """
    reference = Config(cluster=config.cluster)
    return [
        _row(setting, scenario)
        for reading in READINGS
        for setting in [Setting(reference, reading, assumed=False)]
        for phase in config.bench.phases
        if phase in _BATCHES
        for experts in _EXPERTS
        for scenario in _scenarios(setting, experts, phase, config.bench.baselines)
    ]


def _scenarios(setting: Setting, experts: int, phase: str, baselines: tuple[int, ...]) -> list[Scenario]:
    batch = _BATCHES[phase]
    scenarios = [setting.scenario(experts, experts, phase, batch, _CONTEXT)]
    for degree in baselines:
        if degree < experts and experts % degree == 0:
            scenarios.append(setting.scenario(experts, degree, phase, batch, _CONTEXT))
            if experts // degree <= setting.model.layers:
                scenarios.append(setting.scenario(experts, degree, phase, batch, _CONTEXT, pp=experts // degree))
    return scenarios


def _row(setting: Setting, scenario: Scenario) -> dict:
    layout = scenario.layout
    staggered = dataclasses.replace(scenario, layout=dataclasses.replace(layout, overlap="staggered"))
    best: Prediction = min((predict(scenario), predict(staggered)), key=lambda one: one.step_s)
    proposed = layout.ep == scenario.model.moe.num_experts
    return {
        "study": "full size",
        "layout": "proposed" if proposed else "baseline, pipeline" if layout.pp > 1 else "baseline, replicas",
        "experts": scenario.model.moe.num_experts,
        "ep": layout.ep,
        "data": layout.gpus // layout.pp // layout.ep,
        "pipeline_stages": layout.pp,
        "devices": layout.gpus,
        "network": setting.reading,
        "gpu": scenario.fabric.gpu.name,
        "phase": scenario.workload.phase,
        "sequence": scenario.workload.context,
        "tokens_per_microbatch": scenario.workload.tokens,
        "routing": scenario.routing.name,
        "transport": layout.transport,
        "tokens_per_s": best.tokens_per_s,
        "ms_per_step": best.step_s * 1e3,
        # A prompt goes through all stages; the simulator counts them in decode alone.
        "ms_per_token_median": best.ms_per_token * (layout.pp if scenario.workload.phase == "prefill" else 1),
        "ms_per_token_p95": None,
        "ms_per_token_p99": None,
        "mfu": best.mfu,
        "bytes_sent": _bytes_sent(scenario, best),
        "memory_bandwidth_utilisation": best.memory_bandwidth_utilisation,
        "bytes_per_device": {"total": sum(best.bytes_per_gpu.values())},
        "max_over_mean_load": best.max_over_mean_load,
        "feasible": best.feasible,
        "error_bar": round(validation.bar_of_phase(scenario.workload.phase), 4),
        "kind": "predicted" if best.feasible else "predicted, memory ignored",
    }


def _bytes_sent(scenario: Scenario, prediction: Prediction) -> float:
    """Returns a GPU's bytes in a step, over its NIC and over NVLink."""
    fabric = scenario.fabric
    nic = prediction.nic_utilisation * fabric.nic_bytes_per_s / fabric.gpus_per_nic
    return (nic + prediction.nvlink_utilisation * fabric.gpu.nvlink_bytes_per_s) * prediction.step_s
