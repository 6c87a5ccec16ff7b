"""The one prompt, as token ids: prefix(query) · document · suffix.

The control tokens of the template are put in by id, and texts are encoded by a private copy of the tokenizer that knows
no added token at all. So a document that spells `<|im_end|>` is read as those ten characters and cannot close its own turn.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from zerank_integrations.errors import CheckpointRefused, QueryTooLong
from zerank_integrations.recent import Recent

if TYPE_CHECKING:
    from tokenizers import Tokenizer

START, END, YES = "<|im_start|>", "<|im_end|>", "Yes"
SUFFIX = f"{END}\n{START}assistant\n"
WORD_JOINER = "\u2060"
SURROGATE = re.compile("[\ud800-\udfff]")

ControlTokens = Literal["text", "parse"]

# A million tokens are 4 MB of ids beside about 4 MB of text. Encoding 75 kB takes 19 ms, finding its ids again 0.1 ms.
REMEMBERED_TOKENS = 1_000_000

# Texts whose pieces could merge across a seam in an unusual tokenizer: letters, digits, marks, newlines, nothing.
PROBES = (
    ("What is 2+2?", "4"),
    ("sort a list", ""),
    ("\u0301accent first", "\u00e9t\u00e9 - e\u0301te\u0301"),
    ("12 or 13", "13\n\nlines\r\n  and spaces"),
    ("'s", "'s \u4f60\u597d \U0001f600"),
    ("{braces}", "</tag> user\nsystem"),
)


def head(query: str) -> str:
    """The prompt's text up to where the document begins."""
    return f"{START}system\n{query}{END}\n{START}user\n"


def prompt(query: str, document: str) -> str:
    """The whole prompt as text; query and document are stripped."""
    return head(query.strip()) + document.strip() + SUFFIX


def with_instruction(query: str, instruction: str | None) -> str:
    """The query with zerank-2's instruction, which goes inside the query's text."""
    return query if instruction is None else f"{query.strip()}\n<instruction>{instruction.strip()}</instruction>"


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One pair as token ids.

    Prompts of one query share one prefix object, and equal documents of a request one document object: what is shared is
    told by identity.
    """

    prefix: Sequence[int]
    document: Sequence[int]
    suffix: Sequence[int]
    truncated: bool

    def __len__(self) -> int:
        """Tokens in the prompt."""
        return len(self.prefix) + len(self.document) + len(self.suffix)

    @property
    def ids(self) -> list[int]:
        """All ids in order."""
        return [*self.prefix, *self.document, *self.suffix]


def readable(text: str) -> tuple[str, int]:
    """The text with lone surrogates, which no tokenizer can encode, read as U+FFFD; and how many of them there were."""
    return (text, 0) if text.isascii() else SURROGATE.subn("\ufffd", text)


class PromptEncoder:
    """Turns (query, documents) into prompts with one checkpoint's tokenizer.

    Args:
        tokenizer: the checkpoint's tokenizer (the `tokenizers` backend). It is copied, never changed.
        control_tokens: "text" reads added tokens inside queries and documents as plain characters;
            "parse" lets the tokenizer match them, as the published files do.

    Attributes:
        pieces: whether pieces encoded apart equal the whole string with this tokenizer. If they do not, every pair is
            encoded as one string, which is slower.
        yes: the id of "Yes".

    Raises:
        CheckpointRefused: the tokenizer has no ChatML tokens, or no single token for "Yes".
    """

    def __init__(self, tokenizer: Tokenizer, control_tokens: ControlTokens = "text") -> None:
        definition = json.loads(tokenizer.to_str())
        # A post-processor may add tokens of its own, truncation and padding would cut the assistant's turn.
        definition.update(post_processor=None, truncation=None, padding=None)
        load = type(tokenizer).from_str
        self._parsing = load(json.dumps(definition))
        self.control_tokens = control_tokens
        self._start, self._end = (self._control_id(token) for token in (START, END))

        self._added = {token["content"]: token["id"] for token in definition["added_tokens"]}
        self._plain = load(json.dumps(definition | {"added_tokens": []}))
        leaked = sorted(text for text in self._added if set(self._ids(self._plain, text)) & set(self._added.values()))
        if leaked:
            msg = (
                f"the tokenizer still produces its control tokens for the plain texts {leaked} after they were removed from "
                "its added tokens; expected ordinary tokens. Rebuild tokenizer.json with control tokens outside the vocabulary"
            )
            raise CheckpointRefused(msg)
        self._texts = self._parsing if control_tokens == "parse" else self._plain

        yes = self._ids(self._plain, YES)
        if len(yes) != 1:
            msg = f'the tokenizer encodes "{YES}" as {len(yes)} tokens; expected one, as Qwen3\'s tokenizer does'
            raise CheckpointRefused(msg)
        self.yes = yes[0]

        plain, start, end = self._plain, self._start, self._end
        newline = self._ids(plain, "\n")
        self._before_query = [start, *self._ids(plain, "system\n")]
        self._after_query = [end, *newline, start, *self._ids(plain, "user\n")]
        self.suffix = array("i", [end, *newline, start, *self._ids(plain, "assistant\n")])
        self._prefixes: Recent[array[int]] = Recent(REMEMBERED_TOKENS // 10)
        self._documents: Recent[array[int]] = Recent(REMEMBERED_TOKENS)
        self.pieces = all(
            self._joined(query, document).ids == self._ids(self._parsing, prompt(query, document)) for query, document in PROBES
        )

    def encode(self, query: str, documents: Sequence[str], max_length: int) -> list[Prompt]:
        """Prompts of at most `max_length` tokens. Only documents are cut, at their end.

        Raises:
            QueryTooLong: template and query leave no token for a document.
        """
        query, documents = query.strip(), [document.strip() for document in documents]
        each = list(dict.fromkeys(documents))
        encoded: Sequence[tuple[Sequence[int], Sequence[int], Sequence[int]]]
        if self.pieces:
            prefix = self._prefix(query)
            encoded = [(prefix, ids, self.suffix) for ids in self._document_ids(each)]
        else:
            whole = [self._split_whole(query, document) for document in each]
            one: dict[tuple[int, ...], Sequence[int]] = {}
            encoded = [(one.setdefault(tuple(prefix), prefix), ids, suffix) for prefix, ids, suffix in whole]
        prompts = {document: self._fit(*parts, max_length) for document, parts in zip(each, encoded, strict=True)}
        return [prompts[document] for document in documents]

    def forget(self) -> None:
        """Forget the ids of every text."""
        self._prefixes.forget()
        self._documents.forget()

    def offsets(self, documents: Sequence[str]) -> list[list[tuple[int, int]]]:
        """For each document the (start, end) characters of each of its tokens."""
        return [encoding.offsets for encoding in self._texts.encode_batch(list(documents), add_special_tokens=False)]

    def room(self, query: str, max_length: int) -> int:
        """Tokens left for a document beside this query.

        Raises:
            QueryTooLong: none is left.
        """
        return max_length - len(self.encode(query, [""], max_length)[0])

    def whole(self, query: str, document: str) -> list[int]:
        """Ids of the prompt encoded as one string by the tokenizer as it came."""
        return self._ids(self._parsing, prompt(query, document))

    def _prefix(self, query: str) -> array[int]:
        known = self._prefixes.get(query)
        if known is not None:
            return known
        ids = [*self._before_query, *self._ids(self._texts, query), *self._after_query]
        return self._prefixes.put(query, array("i", ids))

    def _document_ids(self, documents: list[str]) -> list[array[int]]:
        known = [self._documents.get(document) for document in documents]
        missing = [document for document, ids in zip(documents, known, strict=True) if ids is None]
        encoded = iter(self._batch(self._texts, missing))
        return [
            self._documents.put(document, array("i", next(encoded))) if ids is None else ids
            for document, ids in zip(documents, known, strict=True)
        ]

    def _joined(self, query: str, document: str) -> Prompt:
        prefix = [*self._before_query, *self._ids(self._plain, query.strip()), *self._after_query]
        return Prompt(prefix, self._ids(self._plain, document.strip()), self.suffix, truncated=False)

    def _split_whole(self, query: str, document: str) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
        """Encode one string and find the document's tokens in it by their characters."""
        if self.control_tokens == "text":
            query, document = self._defused(query), self._defused(document)
        before = head(query)
        encoding = self._parsing.encode(before + document + SUFFIX, add_special_tokens=False)
        starts = [start for start, _ in encoding.offsets]
        # A token that straddles the seam belongs to the template: cutting it would damage the turn.
        first = sum(start < len(before) for start in starts)
        last = sum(start < len(before) + len(document) for start in starts)
        return encoding.ids[:first], encoding.ids[first:last], encoding.ids[last:]

    def _defused(self, text: str) -> str:
        """The text with an invisible word joiner inside each added token, so that the tokenizer does not match it."""
        pattern = "|".join(map(re.escape, sorted(self._added, key=len, reverse=True)))
        return re.sub(pattern, lambda match: match[0][0] + WORD_JOINER + match[0][1:], text) if pattern else text

    @staticmethod
    def _fit(prefix: Sequence[int], document: Sequence[int], suffix: Sequence[int], max_length: int) -> Prompt:
        room = max_length - len(prefix) - len(suffix)
        if room <= 0:
            msg = (
                f"the query and the template take {len(prefix) + len(suffix)} tokens of a prompt of at most {max_length} and "
                "leave no room for a document; expected fewer. Shorten the query or raise max_length"
            )
            raise QueryTooLong(msg)
        truncated = len(document) > room
        return Prompt(prefix, document[:room] if truncated else document, suffix, truncated)

    def _control_id(self, token: str) -> int:
        ids = self._ids(self._parsing, token)
        if len(ids) != 1:
            msg = (
                f"the tokenizer encodes {token} as {len(ids)} tokens; expected one control token. "
                "A zerank checkpoint brings a Qwen3 tokenizer: copy its tokenizer files into the folder"
            )
            raise CheckpointRefused(msg)
        return ids[0]

    @staticmethod
    def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    @staticmethod
    def _batch(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
        # The fast variant keeps no offsets; ids are equal.
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
