"""Completing prompts from a checkpoint that training wrote."""

import sys
from collections.abc import Iterator
from pathlib import Path

from jax.sharding import Mesh

from moe_ep.config import Config
from moe_ep.cost.micro_batch import MicroBatchPlan
from moe_ep.data import Tokenizer, make_tokenizer
from moe_ep.data.tokenizer import NumberTokenizer
from moe_ep.dispatch import check_transport
from moe_ep.mesh import expert_degree, free_bytes, make_mesh
from moe_ep.model.transformer import for_platform
from moe_ep.serve.engine import Engine
from moe_ep.serve.output import Answers, open_output
from moe_ep.serve.prompts import make_requests, read_prompts
from moe_ep.serve.request import Completion, Request, Update
from moe_ep.serve.restore import restore, trained_config
from moe_ep.serve.sampler import draw, greedy
from moe_ep.serve.size import choose_size


def generate(config: Config, workdir: Path) -> dict:
    """Completes the prompts that the config names, from the newest checkpoint of the work directory.

    Text streams to a terminal; elsewhere every completion is a line of JSON. A prompt
    that is refused has its own answer and changes nothing for the others; an
    interruption (Ctrl-C) cancels what has not ended and answers it with what there is.

    Returns:
      completions: of each prompt, in order, its id, prompt and text, how many tokens
      that is, their ids, milliseconds a token after the first (None for fewer than two
      tokens), how it finished, and why it was refused (None if it was not).

    Raises:
      ConfigError: no checkpoint, no prompt, or a mesh that does not fit the experts.
    """
    config = trained_config(config, workdir)
    lines, are_json = read_prompts(config.generate)
    tokenizer = _tokenizer(config)
    asked = list(make_requests(lines, are_json, config.generate, tokenizer, config.seed))
    mesh = make_mesh(config.mesh, config.cluster, config.model.moe.num_experts)
    check_transport(config.dispatch.transport, mesh)
    requests = [one.request for one in asked if one.request is not None]
    engine = make_engine(config, workdir, mesh, tokenizer, requests) if requests else None
    answers = Answers(asked, tokenizer, open_output(sys.stdout, [one.prompt for one in asked]))
    _answer(engine, requests, answers)
    return {"completions": answers.results}


def make_engine(
    config: Config, workdir: Path, mesh: Mesh, tokenizer: Tokenizer, requests: list[Request]
) -> Engine:
    """Returns a warm engine of the newest checkpoint, sized for the requests and the memory that is free.

    Raises:
      ConfigError: no checkpoint, or memory for not even a page.
    """
    model = for_platform(config.model, mesh.devices.flat[0].platform)
    parameters, bias = restore(workdir, model, mesh)
    peers = expert_degree(mesh)
    plan = MicroBatchPlan(
        model=model,
        sequence=1,
        active_experts=model.moe.num_experts // peers,
        peers=peers,
        fused_attention=model.attention.implementation == "cudnn",
    )
    lengths = [(len(request.prompt), request.max_tokens) for request in requests]
    engine = Engine(
        model,
        parameters,
        bias,
        mesh,
        choose_size(config.generate, plan, lengths, mesh.size, free_bytes(mesh)),
        dispatch=config.dispatch,
        vocabulary=tokenizer.vocabulary_size,
        sampler=draw if any(request.temperature > 0 for request in requests) else greedy,
    )
    engine.warm_up()
    return engine


def _answer(engine: Engine | None, requests: list[Request], answers: Answers) -> None:
    updates: Iterator[Update] = engine.complete(requests) if engine else iter(())
    try:
        for update in updates:
            answers.take(update)
    except KeyboardInterrupt:
        for id in answers.open_ids:
            answers.take(Update(id, (), Completion(id, answers.tokens_of(id), "cancelled")))
    answers.close()


def _tokenizer(config: Config) -> Tokenizer:
    if config.data.path.startswith("synthetic:"):
        return NumberTokenizer(config.model.vocabulary)
    return make_tokenizer(config.data.tokenizer, config.model.vocabulary)
