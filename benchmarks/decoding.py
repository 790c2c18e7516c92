"""A population's generation of text against the plain model's of as many sequences at once.

The model has SmolLM2-135M's sizes and random weights, which cost the same. `N` members, in antithetic pairs, answer
`prompts` prompts each. The population draws its noise in every call; the plain model answers N x prompts prompts. A
call that says one token is prefill; what a longer call takes beyond it is decoding.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

import nesjax
from examples.llama.model import Config, Llama, empty_cache, generate

from .measure import compiled, interleave, summary
from .tables import count, figure, markdown

SMOLLM2 = Config(49152, 576, 1536, 30, 9, 3, 64, 8192, 1e5, 1e-5)
NEVER = -1  # no token, so that no answer ends early


def cases(quick: bool) -> list[dict]:
    layers, vocabulary, members, prompt, length = (2, 512, 4, 4, 3) if quick else (30, 49152, 32, 16, 9)
    size = {"layers": layers, "vocabulary": vocabulary, "members": members, "prompts": 2}
    size |= {"prompt": prompt, "length": length}
    whole, chunk = {"chunk_size": None}, {"chunk_size": members // 4}
    return [{**size, "dtype": "float32", **whole}, *({**size, "dtype": "bfloat16", **at} for at in (whole, chunk))]


def measure(
    layers: int, vocabulary: int, members: int, prompts: int, prompt: int, length: int, dtype: str,
    chunk_size: int | None,
) -> Iterator[dict]:  # fmt: skip
    """One row: seconds of both, and the population's speed as a share of the plain model's, round by round."""
    config = dataclasses.replace(SMOLLM2, layers=layers, vocabulary=vocabulary, dtype=jnp.dtype(dtype))
    shapes = jax.eval_shape(Llama(config).init, jax.random.key(0), jnp.zeros((1, 2), int), empty_cache(config, 1, 2))
    draw = lambda shape: 0.02 * jax.random.normal(jax.random.key(0), shape.shape)
    params = jax.jit(lambda: jax.tree.map(lambda shape: draw(shape).astype(dtype), shapes))()
    population = nesjax.Population(members, std=0.001, antithetic=True, chunk_size=chunk_size)
    asked = jax.random.randint(jax.random.key(1), (prompts, prompt), 0, vocabulary), jnp.zeros(prompts, int)
    programs = {}
    for name, function in (("plain", plain), ("population", drawn)):
        for part, said in (("prefill", 1), ("whole", length)):
            run = functools.partial(function, config, population, asked, said)
            programs[name, part] = compiled(run, params, jax.random.key(0))
    calls = {at: lambda key, program=program: program(params, key) for at, (program, _) in programs.items()}
    times = interleave(calls, [(jax.random.key(at),) for at in range(2)], rounds=9, seconds=120)
    for name in ("plain", "population"):
        times[name, "decode"] = [b - a for a, b in zip(times[name, "prefill"], times[name, "whole"])]
    yield {
        **{part: summary(times["plain", part], times["population", part]) for part in ("prefill", "decode")},
        "tokens_per_second": members * prompts * (length - 1) / summary(times["population", "decode"])["seconds"][0],
        "temp_bytes": {name: programs[name, "whole"][1] for name in ("plain", "population")},
    }


def plain(config, population, asked, length, params, key):
    """The plain model's answers, each prompt's as often as there are members."""
    tokens, first = (jnp.repeat(x, population.size, 0) for x in asked)
    return generate(config, params, tokens, first, key, length=length, end=NEVER)


def drawn(config, population, asked, length, params, key):
    """The answers of a population that is drawn here."""
    population = population.for_model(Llama(config), asked[0], empty_cache(config, *asked[0].shape))
    noise, keys = nesjax.sample_noise(key, params, population), nesjax.member_keys(key, population)
    say = lambda params, key: generate(config, params, *asked, key, length=length, end=NEVER)
    return nesjax.population_apply(say, params, noise, keys, in_axes=0, strict=True)


def table(results: dict) -> str:
    """The population's speed as a share of the plain model's, and the temporary memory of both."""
    lines = []
    for row in results["rows"]:
        shares = [f"{100 * row[part]['multiple'][0]:.0f} %" for part in ("prefill", "decode")]
        memory = [count(row["temp_bytes"][name]) for name in ("plain", "population")]
        size = f"{row['members']} x {row['prompts']}"
        chunk = str(row["chunk_size"] or "all")
        lines.append([row["dtype"], size, chunk, *shares, figure(row["tokens_per_second"]), *memory])
    header = ["", "members x prompts", "at a time", "prefill", "decoding", "tokens per second", "plain", "population"]
    return markdown(header, lines)
