"""Cases of a sweep: scenarios with what varies between them, and a row of figures for each."""

import collections.abc
import dataclasses
import typing

from moe_ep.cost.network import Fabric
from moe_ep.cost.routing import make_routing
from moe_ep.simulate.predict import predict
from moe_ep.simulate.scenario import DoesNotFit, Scenario

Row = dict[str, typing.Any]
# A name for each varied input, and the scenario that has it.
Case = tuple[dict[str, typing.Any], Scenario]

SIZES = (16, 32, 64, 128)


def evaluate(cases: collections.abc.Iterable[Case], title: str) -> list[Row]:
    """Predicts every case, with a progress bar on standard error; one that does not fit says what is missing."""
    from tqdm import tqdm

    return [_row(varied, scenario) for varied, scenario in tqdm(list(cases), desc=title, unit="layout", leave=False)]


def _row(varied: dict[str, typing.Any], scenario: Scenario) -> Row:
    layout = scenario.layout
    row = {**varied, "gpus": layout.gpus, "ep": layout.ep, "pp": layout.pp, "overlap": layout.overlap,
           "transport": layout.transport, "batch_per_gpu": scenario.workload.tokens}  # fmt: skip
    try:
        prediction = predict(scenario)
    except DoesNotFit as error:
        return {**row, "feasible": False, "missing_bytes": error.missing_bytes}
    row.update(
        feasible=prediction.feasible,
        missing_bytes=prediction.missing_bytes,
        tokens_per_s=prediction.tokens_per_s,
        tokens_per_s_per_gpu=prediction.tokens_per_s_per_gpu,
        ms_per_token=prediction.ms_per_token,
        mfu=prediction.mfu,
        nic_utilisation=prediction.nic_utilisation,
        exposed_communication_share=prediction.exposed_communication_share,
        max_over_mean_load=prediction.max_over_mean_load,
        bytes_per_gpu=sum(prediction.bytes_per_gpu.values()),
        bottleneck=prediction.bottleneck,
        kind="predicted, memory ignored" if prediction.memory_ignored else "predicted",
    )
    return row


def with_size(scenario: Scenario, experts: int, gpus: int, ep: int, pp: int = 1) -> Scenario:
    """Returns the scenario with another number of experts, GPUs, EP degree and stages."""
    moe = dataclasses.replace(scenario.model.moe, num_experts=experts)
    routing = scenario.routing
    if experts != scenario.model.moe.num_experts:
        routing = make_routing(scenario.routing.name, experts, moe.top_k)
    return dataclasses.replace(
        scenario,
        model=dataclasses.replace(scenario.model, moe=moe),
        layout=dataclasses.replace(scenario.layout, gpus=gpus, ep=ep, pp=pp),
        routing=routing,
    )


def with_nics(scenario: Scenario, nics_per_node: int) -> Scenario:
    """Returns the scenario with another number of NICs in a node."""
    return dataclasses.replace(scenario, fabric=dataclasses.replace(scenario.fabric, nics_per_node=nics_per_node))


def readings(fabric: Fabric) -> dict[str, int]:
    """Returns the two readings of a cluster's NICs: one for each GPU, one for each node."""
    return {"NIC per GPU": fabric.gpus_per_node, "NIC per node": 1}
