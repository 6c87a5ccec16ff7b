"""What every scorer is held against: plain transformers, one pair at a time, and sentence-transformers.

Written apart from the package on purpose: nothing here imports it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

Pair = tuple[str, str]

BEFORE_QUERY = "<|im_start|>system\n"
BEFORE_DOCUMENT = "<|im_end|>\n<|im_start|>user\n"
AFTER_DOCUMENT = "<|im_end|>\n<|im_start|>assistant\n"


# -------------------------------------------------------------------------------------------------------------- scores


def reference_ids(
    tokenizer: PreTrainedTokenizerBase,
    query: str,
    document: str,
    max_length: int | None = None,
    control_tokens: Literal["parse", "literal"] = "parse",
) -> list[int]:
    """Return the prompt's token ids; beyond `max_length` of them, the document's last ids are left out.

    With "parse" the whole string goes through the ordinary tokenizer, as upstream does. With "literal" query and
    document are encoded by a tokenizer without added tokens, so that nothing in them can become a control token.

    Raises:
        ValueError: when not one document token fits.
    """
    query, document = query.strip(), document.strip()

    def parsed(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    if control_tokens == "parse":
        whole = parsed(BEFORE_QUERY + query + BEFORE_DOCUMENT + document + AFTER_DOCUMENT)
        head, middle = parsed(BEFORE_QUERY + query + BEFORE_DOCUMENT), parsed(document)
    else:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        plain = Tokenizer.from_str(json.dumps(backend | {"added_tokens": [], "post_processor": None}))
        head = parsed(BEFORE_QUERY) + plain.encode(query).ids + parsed(BEFORE_DOCUMENT)
        middle = plain.encode(document).ids
        whole = head + middle + parsed(AFTER_DOCUMENT)
    if max_length is None or len(whole) <= max_length:
        return whole
    tail = parsed(AFTER_DOCUMENT)
    room = max_length - len(head) - len(tail)
    if room < 1:
        raise ValueError(f"{len(head) + len(tail)} tokens are taken before the document, of {max_length}")
    return head + middle[:room] + tail


@torch.inference_mode()
def reference_logits(
    folder_or_model: str | Path | nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Iterable[Pair],
    max_length: int | None = None,
    control_tokens: Literal["parse", "literal"] = "parse",
) -> list[float]:
    """Return the logit of "Yes" at the last prompt token of each pair, in float32, by the model's own head."""
    if isinstance(folder_or_model, nn.Module):
        model = folder_or_model
    else:
        model = AutoModelForCausalLM.from_pretrained(folder_or_model, dtype=torch.float32)
    model.eval()
    (yes,) = tokenizer("Yes", add_special_tokens=False)["input_ids"]
    logits = []
    for query, document in pairs:
        ids = reference_ids(tokenizer, query, document, max_length, control_tokens)
        logits.append(model(input_ids=torch.tensor([ids])).logits[0, -1, yes].item())
    return logits


def sentence_transformers_logits(folder: str | Path, pairs: Sequence[Pair], batch_size: int = 1) -> list[float]:
    """Return what `CrossEncoder.predict` answers for each pair: zerank-2's layout gives raw logits.

    Larger batches are padded on the left, which shifts the positions and doubles the float32 noise.
    """
    from sentence_transformers import CrossEncoder

    encoder = CrossEncoder(str(folder), device="cpu", local_files_only=True)
    return encoder.predict(list(pairs), batch_size=batch_size, show_progress_bar=False).tolist()


# --------------------------------------------------------------------------------------------------------------- pairs

_PHRASES = (
    "How do I read a file line by line?",
    "The quick brown fox jumps over the lazy dog.",
    "open the paper and read what it says about the river",
    "It's 12,345.67 miles -- isn't it? They'LL say WE'VE been there.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich",
    "Où est passée la clé du château ? Ça, c’est une « question ».",
    "Съешь же ещё этих мягких французских булок",
    "Η γρήγορη αλεπού πηδά πάνω από τον σκύλο",
    "天地玄黃，宇宙洪荒。日月盈昃，辰宿列張。",
    "いろはにほへと ちりぬるを カタカナ ﾊﾝｶｸ",
    "키스의 고유조건은 입술끼리 만나야 하고",
    "صباح الخير، كيف حالك اليوم؟ ١٢٣",
    "שָׁלוֹם עֲלֵיכֶם",
    "नमस्ते दुनिया, क्षत्रिय",
    "สวัสดีชาวโลก ที่นี่ไม่มีช่องว่าง",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇧🇷 👍🏽 ☎️",
    "cafe\u0301 nai\u0308ve A\u030a \u1e9b\u0323 Z\u0351\u036b\u0343algo",  # combining marks, composed by NFC
    "ﬁ ① ㎏ Å Ω \U0001d4d0\U0001d4d1",  # compatibility characters, left alone by NFC
    "\u202eright to left\u202c zero\u200bwidth\u200djoiner\ufeff soft\u00adhyphen",
    "def f(x):\n\treturn {k: v for k, v in x.items()}  # noqa\n\n\n    y = f'{x!r}'",
    '<p class="a">Fish &amp; chips</p>\n<!-- none --><br/>',
    "first line\r\nsecond line\r\n\r\n  indented\r\n",
    "a\n\n\n\nb \t c\u00a0d\u3000e\u2028f\x0bg\x00h",
    "{query} {{ document }} %s {0} \\n $x",
    "http://example.org/?q=1&r=%20#top user@example.org",
    "Yes",
    "No",
    "system\nuser\nassistant",
)
_SPACES = ("", "", "", " ", "\n", "\r\n", "\t ", "\u00a0", "\u3000\n", "\x1c\x85", "\u2029 ")
_CONTROL = ("<|im_end|>", "<|im_start|>user", "<|im_start|>", "<|endoftext|>", "<think>", "</think>", "<tool_call>")


def _text(draw: random.Random, phrases: int) -> str:
    """Join some phrases, each whole, cut anywhere or shuffled, between white space."""
    parts = []
    for _ in range(phrases):
        phrase = draw.choice(_PHRASES)
        match draw.randrange(4):
            case 0:
                phrase = phrase[draw.randrange(len(phrase)) :]
            case 1:
                words = phrase.split()
                draw.shuffle(words)
                phrase = " ".join(words)
        parts.append(phrase)
    return draw.choice(_SPACES) + draw.choice((" ", "\n", " ", ". ", "")).join(parts) + draw.choice(_SPACES)


def random_pairs(n: int, seed: int) -> list[Pair]:
    """Return `n` pairs of many scripts, code, markup and odd white space.

    Of the documents, 1 of 20 is empty or white space and 1 of 40 is long (up to about 1,500 tokens of the tiny
    tokenizer); queries always hold some text. No text holds a control token or a lone surrogate.
    """
    draw = random.Random(seed)
    pairs = []
    for i in range(n):
        query = _text(draw, draw.randint(1, 2))
        while not query.strip():
            query = _text(draw, 1)
        if i % 20 == 7:
            document = draw.choice(("", " ", "\n\n", "\t\r\n \u3000"))
        elif i % 40 == 19:
            document = _text(draw, 32)
        else:
            document = _text(draw, draw.randint(1, 4))
        pairs.append((query, document))
    return pairs


def control_token_pairs(n: int, seed: int) -> list[Pair]:
    """Return `n` pairs like those of `random_pairs` with control tokens in the document and at times in the query."""
    draw = random.Random(seed)

    def tamper(text: str) -> str:
        for _ in range(draw.randint(1, 3)):
            at = draw.randint(0, len(text))
            text = text[:at] + draw.choice(("", "\n", " ")) + draw.choice(_CONTROL) + draw.choice(("", "\n")) + text[at:]
        return text

    pairs = []
    for i in range(n):
        query, document = _text(draw, 1), _text(draw, draw.randint(1, 3))
        pairs.append((tamper(query) if i % 4 == 0 else query.strip() or "Yes", tamper(document)))
    return pairs
