"""A checkpoint to measure with: the shape ratios of zerank-1-small, seeded random weights, zerank-2's layout, a real BPE.

What a forward pass costs depends on the weights' shapes, not on their values. So a few layers of the right proportions stand
for the published checkpoints, and nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from zerank_integrations.embedded import load

CONTEXT = 32_768
VERSION = 2  # of what is written: a folder made by another version is not used again

# The order of their ids is Qwen's.
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- set role = {'query': 'system', 'document': 'user'}.get(message['role'], message['role']) -%}"
    "{{- '<|im_start|>' + role + '\n' + message['content'] | trim + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a Qwen3 decoder."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int

    @property
    def layer(self) -> int:
        """Parameters of one layer's matrices."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def body(self) -> int:
        """Parameters that every token meets."""
        return self.layers * self.layer

    @property
    def head(self) -> int:
        """Parameters of the vocabulary's matrix."""
        return self.vocabulary * self.hidden

    def flops(self, tokens: int, attended: int) -> float:
        """Multiplications and additions of a pass: `tokens` through every matrix, `attended` pairs of query and key."""
        return 2.0 * self.body * tokens + 4.0 * self.layers * self.heads * self.head_dim * attended

    def scaled(self, hidden: int, layers: int) -> Shape:
        """The same proportions at another width and depth, down to the vocabulary's share of the work."""
        # As wide heads as go into the width in pairs: two query heads share one key-value head.
        head_dim = next(size for size in (self.head_dim, 64, 32, 16) if hidden % (2 * size) == 0)
        heads = hidden // head_dim
        small = Shape(hidden, layers, heads, heads * self.kv_heads // self.heads, head_dim, 3 * hidden, 0)
        vocabulary = round(self.head / self.body * small.body / hidden / 8) * 8
        return Shape(**asdict(small) | {"vocabulary": vocabulary})


ZERANK_1_SMALL = Shape(2048, 28, 16, 8, 128, 6144, 151_936)
ZERANK_2 = Shape(2560, 36, 32, 8, 128, 9728, 151_936)
# Eight layers: ours spares most of the last one, which would flatter it too much among fewer.
STAND_IN = ZERANK_1_SMALL.scaled(hidden=384, layers=8)
TINY = ZERANK_1_SMALL.scaled(hidden=64, layers=4)
SHAPES = {"zerank-1-small": ZERANK_1_SMALL, "zerank-2": ZERANK_2, "stand-in": STAND_IN, "tiny": TINY}


def cache() -> Path:
    """Where built checkpoints are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "zerank-integrations" / "benchmarks"


def checkpoint(shape: Shape = STAND_IN, folder: Path | None = None) -> Path:
    """The folder of the stand-in, built on the first call: zerank-2's layout in bfloat16.

    Args:
        shape: its sizes.
        folder: where to keep it; by default in the user's cache, under a name that tells the sizes.
    """
    if folder is None:
        # The collection, and with it the tokenizer, is what this version of Python has to say.
        python = platform.python_version()
        folder = cache() / f"v{VERSION}-python{python}-{shape.hidden}x{shape.layers}-{shape.vocabulary}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Elsewhere first, so that an interrupted build is never taken for a checkpoint.
    with tempfile.TemporaryDirectory(dir=folder.parent) as building:
        built = _stack(causal_lm(shape), tokenizer(shape), Path(building))
        try:
            built.rename(folder)
        except OSError:  # another process was quicker
            if not folder.is_dir():
                raise
    return folder


def tokenizer(shape: Shape) -> Qwen2Tokenizer:
    """A byte-level BPE with Qwen's rules for splitting, trained on the embedded collection, as large as the shape allows."""
    # The vocabulary of zerank-1-small is larger than its tokenizer; here 8,000 tokens are what the collection can teach.
    size = min(8_000, shape.vocabulary - len(CONTROL_TOKENS))
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    rules = (
        r"(?i:'(?:[sdmt]|ll|ve|re))",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("|".join(rules)), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    # The template's words, and the answer, have to be one token each, as they are in Qwen's.
    template = ["Yes\nsystem\nuser\nassistant"] * 20_000
    documents = [document.text for document in load().documents.values()]
    backend.train_from_iterator(template + documents, trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    return Qwen2Tokenizer(
        tokenizer_object=backend,
        unk_token=None,  # type: ignore[arg-type]
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        model_max_length=CONTEXT,
        chat_template=TEMPLATE,
    )


def config(shape: Shape) -> Qwen3Config:
    """The shape in transformers' words."""
    return Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        dtype="bfloat16",
    )


def causal_lm(shape: Shape, device: str = "cpu") -> Qwen3ForCausalLM:
    """The model with seeded random weights in bfloat16, made on the device."""
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = Qwen3ForCausalLM(config(shape)).eval()  # type: ignore[no-untyped-call]
        finally:
            torch.set_default_dtype(before)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        fill(name, parameter.data, generator)
    return model


def fill(name: str, weight: Tensor, generator: torch.Generator) -> None:
    """Random values under which different texts get clearly different logits."""
    if "norm" in name:
        weight.fill_(1)
    elif "embed" in name:
        weight.normal_(0, 0.5, generator=generator)
    else:
        # An average over a text's tokens is small: attention speaks louder, or the last token would hear only itself.
        loud = 3.0 if "o_proj" in name else 1.0
        weight.normal_(0, loud * weight.shape[-1] ** -0.5, generator=generator)


def yes_id(tokens: Qwen2Tokenizer) -> int:
    """The id of "Yes"."""
    (only,) = tokens.encode("Yes", add_special_tokens=False)
    return int(only)


def _stack(model: Qwen3ForCausalLM, tokens: Qwen2Tokenizer, folder: Path) -> Path:
    """Saved by sentence-transformers itself, which so can load it."""
    from sentence_transformers import CrossEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.cross_encoder.modules import LogitScore

    plain, stack = folder / "plain", folder / "stack"
    model.save_pretrained(plain)
    tokens.save_pretrained(plain)
    transformer = Transformer(
        str(plain),
        transformer_task="text-generation",
        model_kwargs={"dtype": torch.bfloat16},
        processing_kwargs={"chat_template": {"add_generation_prompt": True}},
    )
    head = LogitScore(true_token_id=yes_id(tokens))
    encoder = CrossEncoder(modules=[transformer, head], activation_fn=nn.Identity(), device="cpu")
    encoder.save_pretrained(str(stack), create_model_card=False)
    shutil.rmtree(plain)
    return stack


def write_shards(shape: Shape, folder: Path) -> Path:
    """A checkpoint of any shape on disk, in zerank-2's layout too, with one layer in memory at a time.

    Returns:
        The folder.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        skeleton = Qwen3ForCausalLM(config(shape))
    generator = torch.Generator().manual_seed(0)
    shards = list(_by_layer({name: tuple(p.shape) for name, p in skeleton.named_parameters()}))
    index: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name, size in names.items():
            tensors[name] = torch.empty(size, dtype=torch.bfloat16)
            fill(name, tensors[name], generator)
            index[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    settings: dict[str, Any] = config(shape).to_dict()
    (folder / "config.json").write_text(json.dumps(settings | {"architectures": ["Qwen3ForCausalLM"]}, default=str))
    tokens = tokenizer(shape)
    tokens.save_pretrained(folder)
    # What sentence-transformers wrote for the tiny one holds for any size, but for the id of "Yes".
    saved = checkpoint(TINY)
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        shutil.copy(saved / name, folder / name)
    head = json.loads((saved / "1_LogitScore" / "config.json").read_text()) | {"true_token_id": yes_id(tokens)}
    (folder / "1_LogitScore").mkdir(exist_ok=True)
    (folder / "1_LogitScore" / "config.json").write_text(json.dumps(head))
    return folder


def _by_layer(sizes: dict[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Parameters grouped by their layer, those outside of layers together."""
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, size in sizes.items():
        layer = name.split(".layers.")[1].split(".")[0] if ".layers." in name else "rest"
        groups.setdefault(layer, {})[name] = size
    yield from groups.values()
