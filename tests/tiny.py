"""Tiny random Qwen3 checkpoints in every layout a zerank model is published in, and in those to be refused.

Everything is made on the spot from fixed seeds, without a download and within a few hundred milliseconds. Each
builder takes the folder to create and returns the folder to load; `BUILDERS` names them all. All accepted layouts of
the base model carry the very same weights (rounded to bfloat16, so that a bfloat16 folder carries them too).
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
OTHER_ADDED_TOKENS = ("<think>", "</think>", "<tool_call>")
BPE_VOCABULARY = 1500
VOCABULARY = 1536  # padded beyond the tokenizer, as in the published checkpoints
CONTEXT = 4096

CHAT_TEMPLATE = """\
{%- set turns = {"query": "system", "document": "user"} -%}
{%- for message in messages -%}
{{ "<|im_start|>" + turns.get(message.role, message.role) + "\\n" + message.content | trim + "<|im_end|>\\n" }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|im_start|>assistant\\n" }}{%- endif -%}
"""
PLAIN_TEMPLATE = CHAT_TEMPLATE.replace("turns.get(message.role, message.role)", "message.role")
THINKING_TEMPLATE = CHAT_TEMPLATE.replace("assistant\\n", "assistant\\n<think>\\n\\n</think>\\n\\n")
FIXED_SYSTEM_TEMPLATE = """\
{{- "<|im_start|>system\\nJudge whether the document answers the query.<|im_end|>\\n<|im_start|>user\\n" -}}
{%- for message in messages -%}{{ message.role + ": " + message.content | trim + "\\n" }}{%- endfor -%}
{{- "<|im_end|>\\n" -}}
{%- if add_generation_prompt -%}{{ "<|im_start|>assistant\\n" }}{%- endif -%}
"""

_WORDS = tuple(
    """
    a an the this that these those is are was were be been has have had do does did can could may must will would shall
    not and or but nor so if then else when while because although until after before since between among against into
    onto from with without within under over above below near across along around through toward upon about of to in on
    at by for as it its he she they them their we our you your who whom whose which what where why how
    query document system user assistant answer question relevance reranker index search result ranking candidate score
    logit token prompt model checkpoint adapter layer weight head batch train test sample label loss gradient vector
    python function class method argument return import module package string integer float boolean list tuple
    dictionary iterator generator exception error traceback warning thread process socket server client request response
    file folder path read write open close line byte encode decode unicode table column row record database transaction
    commit branch merge license kernel linux shell command password root login network router browser cookie
    river mountain valley forest desert island ocean harbour bridge castle village market kitchen garden orchard window
    planet star moon comet telescope orbit gravity energy pressure temperature electron molecule protein enzyme bacteria
    doctor nurse patient fever medicine dosage surgery lawyer judge contract tenant landlord deposit insurance invoice
    payment salary pension budget interest inflation currency export tariff factory engine piston turbine battery cable
    violin trumpet drummer melody chorus painter canvas sculpture novel poem chapter author printer newspaper letter
    bread butter cheese onion garlic pepper potato carrot lentil walnut honey coffee teapot recipe oven simmer boil
    horse donkey rabbit badger sparrow falcon salmon beetle spider butterfly tortoise elephant
    red green blue yellow purple black white bright dark heavy light quick slow early late cheap costly narrow wide
    deep shallow quiet loud gentle rough ancient modern northern southern eastern western
    walk swim climb carry borrow repair measure compare explain translate deliver harvest polish whisper wander forget
    remember believe choose begin finish improve replace remove
    one two three four five six seven eight nine ten twelve twenty hundred thousand million half quarter first second
    third last next every several many few most enough
    """.split()  # noqa: SIM905 - far shorter than a list of strings
)


# ---------------------------------------------------------------------------------------------------------- tokenizer


def _backend(added: tuple[str, ...]) -> Tokenizer:
    """A byte-level BPE that splits text the way Qwen's does, trained on a few generated sentences."""
    contraction = r"(?i:'(?:[stmd]|re|ve|ll))"
    word = r"[^\r\n\p{L}\p{N}]?\p{L}+"
    digit = r"\p{N}"
    punctuation = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
    space = r"\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("|".join((contraction, word, digit, punctuation, space))), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()

    draw = random.Random(0)
    answers = ["Yes\nNo\nyes\nno\nsystem\nuser\nassistant"] * 400  # often enough to become one token each
    sentences = [" ".join(draw.choices(_WORDS, k=12)).capitalize() + draw.choice(".?!") for _ in range(600)]
    tokenizer.train_from_iterator(
        answers + sentences,
        trainers.BpeTrainer(
            vocab_size=BPE_VOCABULARY,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    # After training, so that their ids come after the vocabulary's, as in Qwen.
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in added if t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in added if t not in SPECIAL_TOKENS])
    return tokenizer


@cache
def backend() -> Tokenizer:
    """The `tokenizers` object that `tokenizer()` wraps; treat it as read-only."""
    return _backend(SPECIAL_TOKENS + OTHER_ADDED_TOKENS)


def tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Qwen2Tokenizer:
    """A fresh transformers tokenizer of about 1,500 tokens with Qwen's pre-tokenizer and ChatML tokens.

    "Yes", "No", "yes" and "no" are ordinary entries of its vocabulary; `<think>`, `</think>` and `<tool_call>` are
    added tokens that are not special.
    """
    return _wrapped(backend(), eos_token="<|im_end|>", chat_template=chat_template)


def _wrapped(backend: Tokenizer, **options: Any) -> Qwen2Tokenizer:  # noqa: ANN401 - passed on as they are
    return Qwen2Tokenizer(
        tokenizer_object=backend, unk_token=None, pad_token="<|endoftext|>", model_max_length=CONTEXT, **options
    )


# ------------------------------------------------------------------------------------------------------------ weights


def _fill(model: nn.Module, seed: int) -> None:
    """Give every parameter seeded values, wide enough that texts get clearly different logits."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name.lower():
            values = 1 + 0.2 * noise
        elif "embed" in name or parameter.ndim == 1:
            values = 0.5 * noise
        elif "o_proj" in name:
            # The last token must hear more of the text than of itself: this is what spreads the logits
            # (standard deviation about 3), without which float32 noise would look large beside it.
            values = 3 * noise * parameter.shape[-1] ** -0.5
        else:
            values = noise * parameter.shape[-1] ** -0.5
        parameter.data.copy_(values.to(torch.bfloat16))


def _shape() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "tie_word_embeddings": True,
        "bos_token_id": backend().token_to_id("<|endoftext|>"),
        "eos_token_id": backend().token_to_id("<|im_end|>"),
        "dtype": "float32",
    }


def config(**options: Any) -> Qwen3Config:  # noqa: ANN401 - passed on as they are
    """The tiny Qwen3: 3 layers, hidden 64, 4 heads over 2 key-value heads of 16, tied embeddings, 4,096 positions."""
    return Qwen3Config(**(_shape() | {"head_dim": 16} | options))


def yes_id() -> int:
    """The id of "Yes", whose logit the checkpoints are scored by."""
    (only,) = backend().encode("Yes").ids
    return only


def base_model() -> Qwen3ForCausalLM:
    """A fresh float32 copy of the causal LM whose weights all accepted layouts carry, in evaluation mode."""
    model = Qwen3ForCausalLM(config())
    _fill(model, seed=1)
    return model.eval()


def _save(model: PreTrainedModel, path: Path, chat_template: str | None = CHAT_TEMPLATE, **options: Any) -> Path:  # noqa: ANN401
    model.save_pretrained(path, **options)
    tokenizer(chat_template).save_pretrained(path)
    return path


def _edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes, indent=2))


def _edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    edit(weights)
    save_file(weights, file, metadata={"format": "pt"})


# --------------------------------------------------------------------------------------------------- accepted layouts


def causal_lm(path: Path) -> Path:
    """A plain Qwen3ForCausalLM folder; its chat template knows query/document as well as system/user."""
    return _save(base_model(), path)


def causal_lm_bfloat16(path: Path) -> Path:
    """The same weights stored in bfloat16, which holds them exactly."""
    return _save(base_model().to(torch.bfloat16), path)


def causal_lm_auto_map(path: Path) -> Path:
    """A causal LM that brings remote code; running it writes `remote_code_ran` into the folder and exits."""
    causal_lm(path)
    classes = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "Model"}
    _edit_config(path, auto_map={auto: f"modeling_x.{name}" for auto, name in classes.items()})
    marker = (path / "remote_code_ran").absolute()
    (path / "modeling_x.py").write_text(
        f"import pathlib\n\npathlib.Path({str(marker)!r}).touch()\nraise SystemExit('remote code was executed')\n"
    )
    return path


def plain_template(path: Path) -> Path:
    """A causal LM whose chat template prints the roles it is given, so only system/user render the prompt."""
    return _save(base_model(), path, PLAIN_TEMPLATE)


def no_template(path: Path) -> Path:
    """A causal LM without any chat template."""
    return _save(base_model(), path, None)


def sharded(path: Path) -> Path:
    """A causal LM in several safetensors shards with their index."""
    return _save(base_model(), path, max_shard_size="200KB")


def _stack(path: Path, *, false_token_id: int | None = None, adapter: bool = False) -> Path:
    from sentence_transformers import CrossEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.cross_encoder.modules import LogitScore

    # The base of an adapter stays beside the stack, because the stack refers to it.
    base = causal_lm(path.with_name(path.name + "-base"))
    transformer = Transformer(
        str(base),
        transformer_task="text-generation",
        processing_kwargs={"chat_template": {"add_generation_prompt": True}},
    )
    head = LogitScore(true_token_id=yes_id(), false_token_id=false_token_id)
    encoder = CrossEncoder(modules=[transformer, head], activation_fn=nn.Identity(), device="cpu")
    if adapter:
        encoder.add_adapter(_lora_config())
        _fill_lora(encoder)
    encoder.save_pretrained(str(path), create_model_card=False)
    return path


def sentence_transformers_stack(path: Path) -> Path:
    """zerank-2's layout, saved by sentence-transformers itself: `modules.json`, the causal LM, `1_LogitScore`."""
    return _stack(path)


def _lora_config() -> Any:  # noqa: ANN401 - peft is imported only where it is needed
    from peft import LoraConfig

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")


def _fill_lora(model: nn.Module) -> None:
    """Give every adapter matrix seeded values that do not depend on how the model is wrapped."""
    adapters = sorted(
        (name[name.index("layers.") :], parameter) for name, parameter in model.named_parameters() if "lora_" in name
    )
    generator = torch.Generator().manual_seed(2)
    for _, parameter in adapters:
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


@contextmanager
def peft_warnings() -> Iterator[None]:
    """Silence the one warning of making a PeftModel: peft 0.21 asks transformers 5.23 by a property's old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def lora(path: Path) -> Path:
    """A LoRA folder without tokenizer, over `base` beside it; `merged` beside it is the equal causal LM."""
    from peft import get_peft_model

    base = causal_lm(path / "base")
    with peft_warnings():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), _lora_config())
    _fill_lora(model)
    model.save_pretrained(path / "adapter")
    _save(model.merge_and_unload(), path / "merged")
    return path / "adapter"


def lora_in_stack(path: Path) -> Path:
    """The same adapter as saved by sentence-transformers: `modules.json`, adapter weights and a tokenizer."""
    return _stack(path, adapter=True)


def _sequence_classification(path: Path, score: Tensor) -> Path:
    model = Qwen3ForSequenceClassification(
        config(num_labels=1, tie_word_embeddings=False, pad_token_id=backend().token_to_id("<|endoftext|>"))
    )
    model.model.load_state_dict(base_model().model.state_dict())
    model.score.weight.data.copy_(score[None])
    return _save(model, path)


def _yes_row() -> Tensor:
    return base_model().get_input_embeddings().weight.detach()[yes_id()]


def sequence_classification(path: Path) -> Path:
    """vLLM's layout: Qwen3ForSequenceClassification, one label, `score.weight = embed["Yes"] / 5`, untied."""
    return _sequence_classification(path, _yes_row() / 5)


def sequence_classification_unscaled(path: Path) -> Path:
    """The same with `score.weight = embed["Yes"]`: its score is the logit itself."""
    return _sequence_classification(path, _yes_row())


def sequence_classification_unrelated(path: Path) -> Path:
    """The same with a score row that is no multiple of "Yes", so that its scale cannot be told."""
    return _sequence_classification(path, torch.randn(64, generator=torch.Generator().manual_seed(3)))


# ------------------------------------------------------------------------------------------------- layouts to refuse


def headless(path: Path) -> Path:
    """An untied causal LM whose `lm_head.weight` is not in the file, so that a loader would make one up."""
    causal_lm(path)
    _edit_config(path, tie_word_embeddings=False)
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    return path


def seqcls_without_score(path: Path) -> Path:
    """A sequence classifier whose `score.weight` is not in the file."""
    sequence_classification(path)
    _edit_weights(path, lambda weights: weights.pop("score.weight"))
    return path


def pickle_only(path: Path) -> Path:
    """A causal LM whose weights lie in `pytorch_model.bin` only."""
    causal_lm(path)
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    return path


def no_chatml(path: Path) -> Path:
    """A causal LM whose tokenizer knows `<|endoftext|>` alone: the prompt's control tokens are mere text to it."""
    base_model().save_pretrained(path)
    _wrapped(_backend(("<|endoftext|>",)), eos_token="<|endoftext|>", chat_template=CHAT_TEMPLATE).save_pretrained(path)
    return path


def other_template(path: Path) -> Path:
    """A causal LM whose chat template puts an empty `<think>` block after the assistant header."""
    return _save(base_model(), path, THINKING_TEMPLATE)


def other_template_fixed_system(path: Path) -> Path:
    """A causal LM whose chat template puts a fixed text into the system turn, query and document into the user's."""
    return _save(base_model(), path, FIXED_SYSTEM_TEMPLATE)


def yes_no_stack(path: Path) -> Path:
    """A sentence-transformers stack that scores logit(Yes) - logit(No), which no zerank does."""
    (no,) = backend().encode("No").ids
    return _stack(path, false_token_id=no)


def encoder(path: Path) -> Path:
    """A tiny BERT cross-encoder with its own WordPiece tokenizer."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + letter for letter in letters)]
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=len(pieces), num_labels=1, **shape))
    _fill(model, seed=4)
    model.save_pretrained(path)
    BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}).save_pretrained(path)
    return path


def empty_folder(path: Path) -> Path:
    """A folder with nothing in it."""
    path.mkdir(parents=True)
    return path


def missing_shard(path: Path) -> Path:
    """Shards whose index names one that is absent."""
    sharded(path)
    sorted(path.glob("model-*.safetensors"))[-1].unlink()
    return path


def truncated_weights(path: Path) -> Path:
    """A causal LM that lacks one of the backbone's tensors."""
    causal_lm(path)
    _edit_weights(path, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    return path


def corrupt_weights(path: Path) -> Path:
    """A causal LM whose weights file breaks off in the middle, as after an interrupted download."""
    causal_lm(path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return path


def lfs_pointer(path: Path) -> Path:
    """A causal LM cloned without git-lfs: the weights file is a pointer of three lines."""
    causal_lm(path)
    (path / "model.safetensors").write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 3441185608\n"
    )
    return path


# ------------------------------------------------------------------------------------------- other model families


def qwen2(path: Path) -> Path:
    """A tiny Qwen2 causal LM (biased projections) with the same tokenizer."""
    return _other_family(Qwen2Config(**_shape()), path)


def llama(path: Path) -> Path:
    """A tiny Llama causal LM with the same tokenizer."""
    return _other_family(LlamaConfig(**_shape()), path)


def mistral(path: Path) -> Path:
    """A tiny Mistral causal LM without a sliding window, with the same tokenizer."""
    return _other_family(MistralConfig(**_shape(), sliding_window=None), path)


def mistral_sliding(path: Path) -> Path:
    """A tiny Mistral causal LM that attends to the last 32 tokens only, with the same tokenizer."""
    return _other_family(MistralConfig(**_shape(), sliding_window=32), path)


def qwen3_sliding(path: Path) -> Path:
    """The tiny Qwen3's weights under a configuration with a window of 32 tokens from the second layer on."""
    causal_lm(path)
    layers = ["full_attention", "sliding_attention", "sliding_attention"]
    _edit_config(path, use_sliding_window=True, sliding_window=32, max_window_layers=1, layer_types=layers)
    return path


def _other_family(config: Qwen2Config | LlamaConfig | MistralConfig, path: Path) -> Path:
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _fill(model, seed=5)
    return _save(model, path)


SAME_LOGITS: tuple[Callable[[Path], Path], ...] = (
    causal_lm,
    causal_lm_bfloat16,
    causal_lm_auto_map,
    plain_template,
    no_template,
    sharded,
    sentence_transformers_stack,
    sequence_classification,
    sequence_classification_unscaled,
)
"""Builders of folders that must be loaded and, in float32, give one and the same logits."""

ADAPTED: tuple[Callable[[Path], Path], ...] = (lora, lora_in_stack)
"""Builders of adapter folders that must be loaded and give the logits of `lora`'s `merged` folder."""

REFUSED: tuple[Callable[[Path], Path], ...] = (
    headless,
    seqcls_without_score,
    sequence_classification_unrelated,
    pickle_only,
    no_chatml,
    other_template,
    other_template_fixed_system,
    yes_no_stack,
    encoder,
    empty_folder,
    missing_shard,
    truncated_weights,
    corrupt_weights,
    lfs_pointer,
)
"""Builders of folders that must be refused (the unrelated score row: unless its scale is recorded)."""

OTHER_FAMILIES: tuple[Callable[[Path], Path], ...] = (qwen2, llama, mistral, mistral_sliding, qwen3_sliding)
"""Builders of other causal LMs with the same tokenizer, for the engine."""

BUILDERS: dict[str, Callable[[Path], Path]] = {
    build.__name__: build for build in SAME_LOGITS + ADAPTED + REFUSED + OTHER_FAMILIES
}
"""Every builder by its name."""
