"""zelo-mini's own tokenizer: a byte-level BPE in which a word has one spelling wherever it stands.

Three choices serve the lexical circuit, which recognises words by their token:

* lower case, and a space at the seams of ``camelCase``, so that ``DictReader`` gives the tokens of ``dict reader``;
* spaces are dropped and pieces that continue a word carry ``##``: ``run`` is the same token after a space, a dot or a
  line break, and differs from the end of ``overrun``;
* all 256 bytes are in the vocabulary in both roles, so that no text is ever unknown.

The ChatML control tokens are added tokens outside the BPE vocabulary: without them (a copy for untrusted text) nothing
can produce their ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CONTINUES = "##"
CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>")
ROLE_WORDS = ("system", "user", "assistant")
# Repeated in front of the training texts so that each is certain to become one token.
ALWAYS_WHOLE = (*ROLE_WORDS, "yes", "\n")

CHAT_TEMPLATE = (
    "{%- for message in messages -%}\n"
    "{%- if message['role'] == 'query' -%}{%- set role = 'system' -%}\n"
    "{%- elif message['role'] == 'document' -%}{%- set role = 'user' -%}\n"
    "{%- else -%}{%- set role = message['role'] -%}{%- endif -%}\n"
    "{{- '<|im_start|>' + role + '\\n' + message['content'] | trim + '<|im_end|>\\n' -}}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}\n"
)


def _untrained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix=CONTINUES))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(r"(?<=[\p{Ll}\p{N}])(?=\p{Lu})|(?<=\p{Lu})(?=\p{Lu}\p{Ll})"), " "),
            normalizers.Lowercase(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # A line break always stands apart: the prompt's pieces meet at line breaks, so encoding them one by
            # one gives the ids of the whole string.
            pre_tokenizers.Split(Regex(r"[\r\n]|[^\S\r\n]+|\p{L}[\p{L}\p{M}]*|\p{N}+|[^\s\p{L}\p{N}]+"), "isolated"),
            pre_tokenizers.Split(Regex(r"[^\S\r\n]+"), "removed"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.WordPiece(prefix=CONTINUES, cleanup=False), decoders.ByteLevel()])
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> Tokenizer:
    """Learn a tokenizer of at most ``vocabulary_size`` ids, control tokens included; the same for the same ``texts``."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    continuing = [CONTINUES + byte for byte in bytes_]
    tokenizer = _untrained()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - len(CONTROL_TOKENS),
        initial_alphabet=bytes_,
        # Listed first, continuing bytes have fixed ids. The trainer would else number them as it meets them, in an order
        # that differs from run to run and decides ties between merges.
        special_tokens=continuing,
        continuing_subword_prefix=CONTINUES,
        show_progress=False,
        min_frequency=2,
    )
    whole = [" ".join(ALWAYS_WHOLE)] * 1000
    tokenizer.train_from_iterator([*whole, *texts], trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = []  # continuing bytes are ordinary pieces
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL_TOKENS])
    for word in (*ROLE_WORDS, "Yes", "\n"):
        ids = tokenizer.encode(word).ids
        if len(ids) != 1:
            raise ValueError(f"{word!r} became {len(ids)} tokens, expected one: give more text or a larger vocabulary")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write ``tokenizer.json``, its configuration and the chat template as transformers' AutoTokenizer reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    configuration = {
        # The generic class takes tokenizer.json as it is; a model's own class would rebuild parts of it.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "eos_token": CONTROL_TOKENS[1],
        "pad_token": CONTROL_TOKENS[1],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(configuration, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def render(query: str, document: str) -> str:
    """The one prompt of zerank: query in the system turn, document in the user turn, open assistant turn."""
    return (
        f"<|im_start|>system\n{query.strip()}<|im_end|>\n"
        f"<|im_start|>user\n{document.strip()}<|im_end|>\n"
        f"<|im_start|>assistant\n"
    )
