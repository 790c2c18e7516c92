"""A tiny random Llama, and a checkpoint of it as such models are published."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.llama import weights
from examples.llama.model import Config, Llama, empty_cache

TINY = Config(300, 24, 40, 2, 4, 2, 6, 64, 1e4, 1e-5)
QWEN = dataclasses.replace(TINY, tied=False, bias=True)
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def random_params(config: Config) -> dict:
    """Parameters of the model's shapes, large enough for answers to differ."""
    args = jnp.zeros((1, 2), int), empty_cache(config, 1, 2)
    leaves, tree = jax.tree.flatten(jax.eval_shape(Llama(config).init, jax.random.key(0), *args))
    draw = np.random.default_rng(0).normal
    return tree.unflatten([jnp.asarray(draw(size=leaf.shape) * leaf.shape[-1] ** -0.3, jnp.float32) for leaf in leaves])


def published(config: Config, params: dict, folder) -> None:
    """A checkpoint as Llamas and Qwen2s are published, of a byte's tokenizer."""
    safetensors = pytest.importorskip("safetensors.flax")
    tokenizers = pytest.importorskip("tokenizers")
    tensors, own = {}, params["params"]
    for path, name, _ in weights.LAYER + weights.BIASES * config.bias:
        module, leaf = path.split("/")
        for layer in range(config.layers):
            tensors[f"model.layers.{layer}.{name}"] = own["blocks"][module][leaf][layer]
    for path, name, _ in weights.WHOLE + weights.HEAD * (not config.tied):
        module, leaf = path.split("/")
        tensors[name] = own[module][leaf]
    tensors = {name: x.T if x.ndim == 2 and "embed" not in name else x for name, x in tensors.items()}
    files = {name: f"model-{at % 2 + 1}.safetensors" for at, name in enumerate(tensors)}  # a large model has several
    for file in set(files.values()):
        part = {name: x for name, x in tensors.items() if files[name] == file}
        safetensors.save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    described = {
        "model_type": "qwen2" if config.bias else "llama", "hidden_act": "silu", "vocab_size": config.vocabulary,
        "hidden_size": config.width, "intermediate_size": config.hidden, "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads, "rope_theta": config.rope_base,
        "max_position_embeddings": config.context, "rms_norm_eps": config.epsilon, "tie_word_embeddings": config.tied,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(described))
    settings = {"eos_token": "<|end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({letter: at for at, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
