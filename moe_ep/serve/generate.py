"""Completing prompts from a checkpoint that training wrote."""

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from moe_ep.config import Config, ConfigError, GenerateConfig
from moe_ep.data import Tokenizer, make_tokenizer
from moe_ep.data.tokenizer import NumberTokenizer
from moe_ep.mesh import make_mesh, place_batch
from moe_ep.model.kv_cache import round_up_rows
from moe_ep.model.transformer import for_platform
from moe_ep.serve.output import open_output
from moe_ep.serve.programs import Programs, make_programs
from moe_ep.serve.restore import restore, trained_config
from moe_ep.serve.sampler import Sampling, draw, greedy

_PROMPT_MULTIPLE = 16  # prompts are padded to a multiple of this


class Completed(NamedTuple):
    """One sequence's new tokens so far, when the first and the newest arrived, and whether it has ended."""

    ids: list[int]
    arrived_s: list[float]
    ended: bool


class Completer:
    """Completes batches of prompts, all with the same two compiled programs.

    Args:
      config: of the run; its model's and data's part as trained.
      workdir: has the checkpoint.
      mesh: of any EP degree.
      longest_prompt: tokens.
    """

    def __init__(self, config: Config, workdir: Path, mesh: Mesh, tokenizer: Tokenizer, longest_prompt: int):
        self._config, self._mesh, self._tokenizer = config, mesh, tokenizer
        self._prompt_tokens = -(-longest_prompt // _PROMPT_MULTIPLE) * _PROMPT_MULTIPLE
        model = for_platform(config.model, mesh.devices.flat[0].platform)
        self._parameters, self._bias = restore(workdir, model, mesh)
        self._programs: Programs = make_programs(
            model,
            mesh,
            config.dispatch,
            sampler=draw if config.generate.temperature > 0 else greedy,
            vocabulary=tokenizer.vocabulary_size,
            cache_rows=round_up_rows(self._prompt_tokens + config.generate.max_tokens),
        )

    def complete(self, prompts: Sequence[np.ndarray], first: int, slots: int) -> Iterator[list[Completed]]:
        """Yields all prompts' completions after each token, until the last has ended.

        Args:
          prompts: token ids, none empty; at most `slots`.
          first: number of the first prompt: a prompt's draws come from the run's seed and its number.
          slots: sequences of the batch, a multiple of the devices.
        """
        tokens, lengths = self._pad(prompts, slots)
        sampling = self._sampling(first, slots)
        batch = self._programs.prefill(self._parameters, self._bias, tokens, lengths, sampling)
        completions = [Completed([], [], False) for _ in prompts]
        for step in range(self._config.generate.max_tokens):
            ahead = None
            if step + 1 < self._config.generate.max_tokens:  # the devices work while the host reads
                ahead = self._programs.decode(self._parameters, self._bias, *batch, sampling)
            arrived = np.asarray(batch.tokens)
            now_s = time.perf_counter()
            last = ahead is None
            completions = [
                self._extend(completion, int(token), now_s, last)
                for completion, token in zip(completions, arrived, strict=False)
            ]
            yield completions
            if all(completion.ended for completion in completions):
                return
            batch = ahead

    def _extend(self, completion: Completed, token: int, now_s: float, last: bool) -> Completed:
        if completion.ended:
            return completion
        if token == self._tokenizer.end_of_text:
            return completion._replace(ended=True)
        return Completed([*completion.ids, token], [*completion.arrived_s, now_s], last)

    def _pad(self, prompts: Sequence[np.ndarray], slots: int) -> tuple[jax.Array, jax.Array]:
        tokens = np.zeros((slots, self._prompt_tokens), np.int32)
        lengths = np.ones(slots, np.int32)  # a slot without a prompt completes token 0, unseen
        for slot, prompt in enumerate(prompts):
            tokens[slot, : len(prompt)] = prompt
            lengths[slot] = len(prompt)
        return place_batch(tokens, self._mesh), place_batch(lengths, self._mesh)

    def _sampling(self, first: int, slots: int) -> Sampling:
        options = self._config.generate
        seeds = np.random.SeedSequence([self._config.seed, first]).generate_state(slots)
        whole = Sampling(
            np.full(slots, options.temperature, np.float32),
            np.full(slots, options.top_k, np.int32),
            np.full(slots, options.top_p, np.float32),
            seeds,
        )
        return Sampling(*(place_batch(array, self._mesh) for array in whole))


def generate(config: Config, workdir: Path) -> dict:
    """Completes the prompts that the config names, from the newest checkpoint of the work directory.

    Text streams to a terminal; elsewhere every completion is a line of JSON.

    Returns:
      completions: of each prompt its text, how many tokens that is, their ids, and
      milliseconds a token after the first (None for fewer than two tokens).

    Raises:
      ConfigError: no checkpoint, no prompt, or a mesh that does not fit the experts.
    """
    config = trained_config(config, workdir)
    prompts = read_prompts(config.generate)
    tokenizer = _tokenizer(config)
    # Training put the end of a text before each text: an empty prompt begins one.
    encoded = [ids if len(ids) else np.array([tokenizer.end_of_text], np.int32) for ids in map(tokenizer.encode, prompts)]
    mesh = make_mesh(config.mesh, config.cluster, config.model.moe.num_experts)
    completer = Completer(config, workdir, mesh, tokenizer, max(map(len, encoded)))

    per_device = min(-(-len(prompts) // mesh.size), config.generate.sequences_per_device)
    slots, results = per_device * mesh.size, []
    for first in range(0, len(prompts), slots):
        output = open_output(sys.stdout, prompts[first : first + slots])
        completions: list[Completed] = []
        for completions in completer.complete(encoded[first : first + slots], first, slots):
            for index, completion in enumerate(completions):
                output.show(index, _result(prompts[first + index], completion, tokenizer), completion.ended)
        results += [_result(prompts[first + index], one, tokenizer) for index, one in enumerate(completions)]
    return {"completions": results}


def read_prompts(options: GenerateConfig) -> list[str]:
    """Returns the prompt of the flag, or else the lines of the file, or else those of standard input.

    Raises:
      ConfigError: none of them has a prompt, or there are two sources.
    """
    if options.prompt and options.prompt_file:
        raise ConfigError(f"--set generate.prompt_file={options.prompt_file}: allowed is one of generate.prompt and this")
    if options.prompt:
        return [options.prompt]
    try:
        text = Path(options.prompt_file).read_text(encoding="utf-8") if options.prompt_file else _standard_input()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"--set generate.prompt_file={options.prompt_file}: allowed is a text file ({reason})") from None
    prompts = text.splitlines()
    if not prompts:
        raise ConfigError(
            f"--set generate.prompt_file={options.prompt_file}: allowed is a file (or standard input) with a prompt a "
            "line, this has none; or --set generate.prompt=TEXT"
        )
    return prompts


def _standard_input() -> str:
    return "" if sys.stdin.isatty() else sys.stdin.read()


def _tokenizer(config: Config) -> Tokenizer:
    if config.data.path.startswith("synthetic:"):
        return NumberTokenizer(config.model.vocabulary)
    return make_tokenizer(config.data.tokenizer, config.model.vocabulary)


def _result(prompt: str, completion: Completed, tokenizer: Tokenizer) -> dict:
    ids, arrived_s = completion.ids, completion.arrived_s
    between = len(ids) - 1
    return {
        "prompt": prompt,
        "text": tokenizer.decode(ids),
        "tokens": len(ids),
        "token_ids": ids,
        "ms_per_token": (arrived_s[-1] - arrived_s[0]) / between * 1e3 if between > 0 else None,
    }
