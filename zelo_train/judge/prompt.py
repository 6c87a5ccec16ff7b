"""What a judge reads: prompt files of our own, with every text of the collection behind a fence.

A fence is a mark that opens and closes each text. It is derived from the texts themselves, so that the same question always
reads the same and its recorded answer is found again; and it is a hash over all of them, so that no text can contain its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from importlib.resources import files
from pathlib import Path

from zelo_train.errors import ConfigError
from zelo_train.records import Kind, Question

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

CRITERION = (
    "a document is relevant if it helps to answer the query; the more directly, completely and correctly, the more relevant."
)

NAMES = ("compare", "vote", "list", "grade", "cross")
_PLACES = frozenset({"criterion", "fence", "material", "letters"})
_PLACE = re.compile(r"\{\{(\w+)\}\}")

# English has about four characters a token; a judge's own tokenizer is not at hand.
CHARACTERS_PER_TOKEN = 4

# What chat templates are made of. A server that reads these inside a message would let a document end its own turn.
_CONTROL = re.compile(
    r"<(?=\|[^\s<>|]{1,40}\|>|\uff5c[^<>]{1,40}\uff5c>|/?(?:s|think|start_of_turn|end_of_turn|bos|eos|pad|unk)>)"
    r"|\[(?=/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS)\])"
    r"|<(?=</?SYS>>)"
)
# Invisible: control characters but tab and line feed, marks that turn the direction of writing, tag characters, lone
# surrogates. Not the joiners U+200C and U+200D, which Persian and Hindi are spelled with.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)


def shown(text: str, tokens: int | None = None) -> str:
    """A text as a judge reads it: at most about so many tokens, nothing invisible, no control token of a chat template.

    Args:
        text: of a query or document.
        tokens: four characters each; longer texts are cut at their end, at white space where there is some. None: not cut.
    """
    # Before cutting, so that what cannot be seen takes no room.
    text = _INVISIBLE.sub("", "\n".join(text.splitlines()))
    text = _CONTROL.sub(lambda found: found[0] + " ", text)
    if tokens is None or len(text) <= tokens * CHARACTERS_PER_TOKEN:
        return text
    text = text[: tokens * CHARACTERS_PER_TOKEN + 1]
    head, space, _ = text.rpartition(" ")
    return head if space and len(head) > len(text) // 2 else text[:-1]


def is_cut(text: str, tokens: int) -> bool:
    """Whether `shown` takes something off a text's end."""
    return len(text) > tokens * CHARACTERS_PER_TOKEN and shown(text, tokens) != shown(text)


def fence_of(texts: Sequence[str]) -> str:
    """A mark that occurs in none of the texts; the same for the same texts.

    128 bits of a hash over all texts: to write a text with its own mark in it is to find a fixed point of the hash.
    """
    joined = "\n".join(texts).casefold()
    for turn in range(1000):
        hashed = blake2b(turn.to_bytes(4, "little"), digest_size=16)
        for text in texts:
            content = text.encode("utf-8", "surrogatepass")
            hashed.update(len(content).to_bytes(8, "little") + content)
        mark = hashed.hexdigest()
        if mark not in joined:
            return mark
    raise AssertionError("a thousand hashes in one text")  # pragma: no cover - 2⁻¹²⁸ each


@dataclass(frozen=True)
class Prompt:
    """A prompt file.

    Attributes:
        name: one of `NAMES`.
        version: as the file says; counts up with each change that is meant.
        system: the first message.
        user: the second.
    """

    name: str
    version: str
    system: str
    user: str

    @classmethod
    def read(cls, name: str, folder: Path | None = None) -> Prompt:
        """The prompt of that name: from `folder` if it has a file of it, else the one that ships with the package.

        Raises:
            ConfigError: the file is not a prompt; the message says what it lacks.
        """
        own = None if folder is None else folder / f"{name}.md"
        source = own if own is not None and own.is_file() else files("zelo_train.judge") / "prompts" / f"{name}.md"
        return cls.parse(name, source.read_text(encoding="utf-8"), str(source))

    @classmethod
    def parse(cls, name: str, text: str, source: str = "the prompt") -> Prompt:
        """A prompt from the text of its file."""
        found = re.fullmatch(r"version: *(\S+)\n--- system ---\n(.+)\n--- user ---\n(.+)", text.strip(), re.DOTALL)
        if found is None:
            msg = (
                f"{source} is not a prompt; expected a line `version: 1`, a line `--- system ---`, the system message, "
                "a line `--- user ---`, the user message"
            )
            raise ConfigError(msg)
        places = set(_PLACE.findall(text))
        lacking = {"criterion", "fence", "material"} - places
        if lacking or places - _PLACES:
            wrong = ", ".join("{{" + place + "}}" for place in sorted(lacking or places - _PLACES))
            expected = ", ".join("{{" + place + "}}" for place in sorted(_PLACES))
            msg = f"{source} {'lacks' if lacking else 'holds unknown places'} {wrong}; expected {expected}"
            raise ConfigError(msg)
        return cls(name, found[1], found[2], found[3])

    @cached_property
    def hash(self) -> str:
        """Of everything in it."""
        return blake2b(f"{self.name}\0{self.version}\0{self.system}\0{self.user}".encode(), digest_size=8).hexdigest()

    def hash_with(self, criterion: str) -> str:
        """Of the prompt as filled with a criterion: what enters the key of an answer."""
        return blake2b(f"{self.hash}\0{criterion}".encode(), digest_size=8).hexdigest()

    def messages(self, kind: Kind, queries: Sequence[str], documents: Sequence[str], criterion: str) -> list[dict[str, str]]:
        """The two messages of a question.

        Args:
            kind: what is asked.
            queries: texts; two for CROSS, else one.
            documents: texts in the order shown.
            criterion: what relevant means.

        Returns:
            As the chat-completions protocol has them.
        """
        fence = fence_of([*queries, *documents, criterion])
        fill = {
            "criterion": criterion,
            "fence": fence,
            "material": material(kind, queries, documents, fence),
            "letters": ", ".join(LETTERS[: len(documents)]),
        }

        # In one pass, so that a text with {{criterion}} in it stays as it is.
        def filled(text: str) -> str:
            return _PLACE.sub(lambda place: fill[place[1]], text)

        return [{"role": "system", "content": filled(self.system)}, {"role": "user", "content": filled(self.user)}]


def material(kind: Kind, queries: Sequence[str], documents: Sequence[str], fence: str) -> str:
    """The fenced texts, in the order shown."""

    def fenced(title: str, text: str) -> str:
        return f"[[{title} {fence}]]\n{text}\n[[END OF {title} {fence}]]"

    names = [""] if kind is Kind.GRADE else [f" {letter}" for letter in LETTERS[: len(documents)]]
    titled = [fenced(f"DOCUMENT{name}", text) for name, text in zip(names, documents, strict=True)]
    if kind is Kind.CROSS:
        asked = [fenced(f"QUERY{name}", text) for name, text in zip(names, queries, strict=True)]
        return "\n\n".join(part for pair in zip(asked, titled, strict=True) for part in pair)
    return "\n\n".join([fenced("QUERY", queries[0]), *titled])


@dataclass(frozen=True)
class Prompts:
    """All prompts of a judge, with the criterion they are filled with.

    Attributes:
        criterion: what relevant means in this domain, in a sentence.
        by_name: the prompt of each name in `NAMES`.
    """

    criterion: str
    by_name: Mapping[str, Prompt]

    @classmethod
    def read(cls, criterion: str = "", folder: Path | None = None) -> Prompts:
        """The prompts, each from `folder` where it has that file, else ours; an empty criterion is the general one."""
        return cls(criterion.strip() or CRITERION, {name: Prompt.read(name, folder) for name in NAMES})

    def of(self, question: Question, *, vote: bool) -> Prompt:
        """The prompt that a question is asked with."""
        match question.kind:
            case Kind.GRADE:
                return self.by_name["grade"]
            case Kind.CROSS:
                return self.by_name["cross"]
            case Kind.COMPARE if len(question.documents) > 2:
                return self.by_name["list"]
            case Kind.COMPARE:
                return self.by_name["vote" if vote else "compare"]

    def preview(self) -> str:
        """All prompts with stand-ins for the texts, for people to read before anything is sent."""
        examples = {
            "compare": (Kind.COMPARE, 1, 2),
            "vote": (Kind.COMPARE, 1, 2),
            "list": (Kind.COMPARE, 1, 3),
            "grade": (Kind.GRADE, 1, 1),
            "cross": (Kind.CROSS, 2, 2),
        }
        told = []
        for name, (kind, queries, documents) in examples.items():
            prompt = self.by_name[name]
            messages = prompt.messages(kind, ["(the query)"] * queries, ["(the document)"] * documents, self.criterion)
            told.append(f"# {name}, version {prompt.version}, {prompt.hash_with(self.criterion)}")
            told += [f"## {message['role']}\n{message['content']}" for message in messages]
        return "\n\n".join(told)
