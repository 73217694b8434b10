"""The reference experiment as scenarios: both readings of its network, its own constants or measured kernels.

"Source's constants" are the percentages that the source assumes (MFU 60 %, memory
80 %, links 85 %, 80 % of communication hidden). "Measured kernels" takes this
project's kernel table scaled to the source's GPU, exact (ragged) bytes and, of
nothing overlapped and two staggered batches, the faster: what is hidden is derived.
"""

import dataclasses
import functools
import typing

from moe_ep.config import Config, ModelConfig
from moe_ep.cost.routing import Routing, make_routing
from moe_ep.cost.units import Number
from moe_ep.simulate.from_config import ASSUMED, fabric_of, with_batch
from moe_ep.simulate.predict import predict
from moe_ep.simulate.scenario import Layout, Scenario, Workload, own_stack
from moe_ep.simulate.step import compute_seconds, network_seconds, stage_work

Row = dict[str, typing.Any]
READINGS = ("NIC per GPU", "NIC per node")
REPRODUCED, NOT, NO_CLAIM = "reproduced", "not reproduced", "no claim of the source"
FORMULA = "simulated, by formula"
_HIDDEN = 0.80  # assumed by the source


@dataclasses.dataclass(frozen=True)
class Setting:
    """One reading of the network and one set of efficiencies, from which every scenario of the ledger is made."""

    config: Config
    reading: str
    assumed: bool

    @property
    def name(self) -> str:
        return f"{self.reading}, {'source’s constants' if self.assumed else 'measured kernels'}"

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    def scenario(
        self, experts: int, ep: int, phase: str, batch: Number, context: int = 1024, gpus: int = 0, pp: int = 1
    ) -> Scenario:
        """Returns a layout on `gpus` (default: as many as experts), memory ignored: the ledger asks for time."""
        moe = dataclasses.replace(self.model.moe, num_experts=experts)
        nics = 1 if self.reading == "NIC per node" else self.config.cluster.gpus_per_node
        cluster = dataclasses.replace(self.config.cluster, nics_per_node=nics)
        layout = Layout(gpus or experts, ep, pp=pp, transport="ragged")
        return with_batch(
            Scenario(
                dataclasses.replace(self.model, moe=moe), fabric_of(cluster), layout, Workload(phase, context),
                routing("balanced", experts, moe.top_k), ASSUMED if self.assumed else own_stack(), ignore_memory=True,
            ),
            batch,
        )  # fmt: skip

    def step_s(self, scenario: Scenario) -> Number:
        """Returns the step; with the source's constants a fifth of the communication shows, or all that cannot hide."""
        if not self.assumed:
            staggered = dataclasses.replace(scenario, layout=dataclasses.replace(scenario.layout, overlap="staggered"))
            return min(predict(scenario).step_s, predict(staggered).step_s)
        stage = stage_work(scenario)
        compute, network = compute_seconds(stage, 1), network_seconds(stage, 1)
        return max(compute + (1 - _HIDDEN) * network, network)

    def speedup(self, experts: int, phase: str, batch: Number, pipeline: bool = False) -> Number:
        """Returns throughput of one expert per GPU over EP 8 on as many GPUs, as replicas or as a pipeline."""
        stages = experts // 8 if pipeline else 1
        wide = self.step_s(self.scenario(experts, experts, phase, batch))
        return self.step_s(self.scenario(experts, 8, phase, batch, pp=stages)) * stages / wide

    def mfu(self, scenario: Scenario) -> Number:
        """Returns MFU at the setting's step."""
        prediction = predict(scenario)
        return prediction.mfu * prediction.step_s / self.step_s(scenario)


@functools.lru_cache(maxsize=None)
def routing(spec: str, experts: int, top_k: int) -> Routing:
    """Returns the routing of that name, made once."""
    return make_routing(spec, experts, top_k)


def row(claim: str, source: str, setting: Setting | None, inputs: str, value: str, verdict: str, kind: str) -> Row:
    """Returns a row of the ledger; without a setting the claim depends on neither network nor kernels."""
    reading = setting.name if setting else "either"
    return {"claim": claim, "source_value": source, "reading": reading, "inputs": inputs, "value": value,
            "verdict": verdict, "kind": kind}  # fmt: skip


def span(values: typing.Sequence[Number], form: str = "{:.2f}x") -> str:
    """Returns the least and the most of the values as text."""
    return f"{form.format(min(values))} to {form.format(max(values))}"
