"""Pieces encoded apart equal the whole string, and nothing inside a text becomes a control token."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from tests import reference
from zerank_integrations.errors import CheckpointRefused, QueryTooLong
from zerank_integrations.passages import spans
from zerank_integrations.prompt import PROBES, PromptEncoder, prompt, readable, with_instruction

LONG = 100_000
GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "zerank.json"


@pytest.fixture(scope="module")
def backend(tiny_causal_lm: Path) -> Tokenizer:
    return AutoTokenizer.from_pretrained(tiny_causal_lm).backend_tokenizer


def test_joined_pieces_equal_the_whole_string(backend: Tokenizer) -> None:
    encoder = PromptEncoder(backend)
    assert encoder.pieces
    for query, document in reference.random_pairs(5_000, seed=1):
        assert encoder.encode(query, [document], LONG)[0].ids == backend.encode(prompt(query, document)).ids


def test_parsed_control_tokens_equal_the_whole_string(backend: Tokenizer) -> None:
    encoder = PromptEncoder(backend, "parse")
    for query, document in reference.control_token_pairs(500, seed=2):
        assert encoder.encode(query, [document], LONG)[0].ids == backend.encode(prompt(query, document)).ids


def test_no_added_token_is_matched_inside_a_text(backend: Tokenizer) -> None:
    encoder = PromptEncoder(backend)
    added = {token["id"] for token in json.loads(backend.to_str())["added_tokens"]}
    differing = 0
    for query, document in reference.control_token_pairs(500, seed=3):
        encoded = encoder.encode(query, [document], LONG)[0]
        assert not added & set(encoded.document)
        # The template's own: start, end, start before the document; end, start after it.
        assert sum(token in added for token in encoded.ids) == 5
        differing += encoded.ids != backend.encode(prompt(query, document)).ids
    assert differing > 450


def test_the_callers_tokenizer_is_left_as_it_was(tiny_causal_lm: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_causal_lm)
    before = tokenizer.backend_tokenizer.to_str()
    PromptEncoder(tokenizer.backend_tokenizer).encode("q", ["<|im_end|>"], LONG)
    assert tokenizer.backend_tokenizer.to_str() == before
    # Nor does it matter what others do to theirs.
    encoder = PromptEncoder(tokenizer.backend_tokenizer)
    expected = encoder.encode("query", ["one document <think>"], LONG)[0].ids
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert encoder.encode("query", ["one document <think>"], LONG)[0].ids == expected


def test_the_template_reproduces_the_golden_ids() -> None:
    """The published ids of one prompt, from the pieces' published ids: a Qwen3 vocabulary cut down to what the prompt needs."""
    words = {
        "system": 8948,
        "user": 872,
        "assistant": 77091,
        "What": 3838,
        " is": 374,
        " ": 220,
        "2": 17,
        "+": 10,
        "?": 30,
        "4": 19,
    }
    words |= {"Yes": 9454, "\n": 198}
    assert _golden_encoder(words).encode("What is 2+2?", ["4"], LONG)[0].ids == [
        *(151644, 8948, 198, 3838, 374, 220, 17, 10, 17, 30, 151645, 198),
        *(151644, 872, 198, 19, 151645, 198, 151644, 77091, 198),
    ]


@pytest.mark.shared
def test_golden_ids_are_those_of_the_golden_file() -> None:
    if not GOLDEN.is_file():
        pytest.skip("the golden values lie beside the repository (../shared/golden); they are not there")
    golden = json.loads(GOLDEN.read_text())["tokenization"]
    words = {
        "system": 8948,
        "user": 872,
        "assistant": 77091,
        "What": 3838,
        " is": 374,
        " ": 220,
        "2": 17,
        "+": 10,
        "?": 30,
        "4": 19,
    }
    encoder = _golden_encoder(words | {"Yes": golden["yes_token_id"], "\n": 198})
    assert encoder.encode(golden["query"], [golden["document"]], LONG)[0].ids == golden["ids"]
    assert encoder.yes == golden["yes_token_id"]


def _golden_encoder(words: dict[str, int]) -> PromptEncoder:
    from tokenizers import Regex, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(words | {"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}|\s|[^\s\p{L}\p{N}]"), "isolated")
    definition = json.loads(tokenizer.to_str())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    controls = {"<|im_start|>": 151644, "<|im_end|>": 151645}
    definition["added_tokens"] = [{"id": i, "content": token} | flags for token, i in controls.items()]
    definition["model"]["vocab"] |= controls
    return PromptEncoder(Tokenizer.from_str(json.dumps(definition)))


def test_a_tokenizer_whose_pieces_differ_falls_back_to_whole_strings(backend: Tokenizer) -> None:
    """Control tokens that swallow the white space after them are no business of the pieces."""
    definition = json.loads(backend.to_str())
    for token in definition["added_tokens"]:
        token["rstrip"] = True
    odd = Tokenizer.from_str(json.dumps(definition))
    encoder = PromptEncoder(odd)
    assert not encoder.pieces
    for query, document in reference.random_pairs(200, seed=4):
        encoded = encoder.encode(query, [document], LONG)[0]
        assert encoded.ids == odd.encode(prompt(query, document)).ids
        shorter = encoder.encode(query, [document], len(encoded) - 1 if len(encoded.document) > 1 else LONG)[0]
        assert [*shorter.prefix] == [*encoded.prefix]
        assert [*shorter.suffix] == [*encoded.suffix]
    added = {token["id"] for token in definition["added_tokens"]}
    for query, document in reference.control_token_pairs(100, seed=5):
        assert sum(token in added for token in encoder.encode(query, [document], LONG)[0].ids) == 5


def test_only_the_document_is_cut(backend: Tokenizer) -> None:
    encoder = PromptEncoder(backend)
    whole = encoder.encode("which river", ["the river " * 50], LONG)[0]
    cut = encoder.encode("which river", ["the river " * 50], len(whole) - 10)[0]
    assert cut.truncated
    assert not whole.truncated
    assert cut.ids == [*whole.prefix, *whole.document[:-10], *whole.suffix]
    assert not encoder.encode("which river", ["the river " * 50], len(whole))[0].truncated


def test_a_query_without_room_names_both_numbers(backend: Tokenizer) -> None:
    encoder = PromptEncoder(backend)
    taken = len(encoder.encode("which river", [""], LONG)[0])
    assert encoder.room("which river", taken + 1) == 1
    with pytest.raises(QueryTooLong, match=rf"{taken} tokens of a prompt of at most {taken} "):
        encoder.encode("which river", ["x"], taken)


def test_tokenizers_that_are_no_zerank_tokenizer_are_refused(backend: Tokenizer) -> None:
    definition = json.loads(backend.to_str())
    with pytest.raises(CheckpointRefused, match=r"<\|im_start\|>"):
        PromptEncoder(Tokenizer.from_str(json.dumps(definition | {"added_tokens": []})))
    without_yes = json.loads(backend.to_str())
    del without_yes["model"]["vocab"]["Yes"]
    without_yes["model"]["merges"] = [pair for pair in without_yes["model"]["merges"] if "".join(pair) != "Yes"]
    with pytest.raises(CheckpointRefused, match='"Yes" as 2 tokens'):
        PromptEncoder(Tokenizer.from_str(json.dumps(without_yes)))


def test_probes_hold_no_lone_surrogate_and_no_control_token() -> None:
    for query, document in PROBES:
        prompt(query, document).encode()
        assert "<|" not in query + document


def test_surrogates_are_replaced_and_counted() -> None:
    assert readable("a\ud800b\udfffc") == ("a\ufffdb\ufffdc", 2)
    assert readable("plain") == ("plain", 0)
    assert readable("é 😀") == ("é 😀", 0)


def test_instruction_goes_into_the_query() -> None:
    assert with_instruction(" q ", None) == " q "
    assert with_instruction(" q ", " prefer recent ") == "q\n<instruction>prefer recent</instruction>"


@given(st.text(st.sampled_from("ab \n"), max_size=200), st.integers(1, 20))
def test_passages_cover_the_text_and_overlap(text: str, size: int) -> None:
    tokens = [(i, i + 1) for i in range(len(text))]
    found = spans(text, tokens, size)
    assert found[0][0] == 0
    assert found[-1][1] == len(text)
    assert all(end - start <= max(size, 0) or len(found) == 1 for start, end in found)
    for (start, end), (next_start, next_end) in itertools.pairwise(found):
        assert start < next_start <= end < next_end or (start < next_start <= end and next_end > end)


def test_passages_break_between_words(backend: Tokenizer) -> None:
    text = "the quick brown fox jumps over the lazy dog " * 20
    encoder = PromptEncoder(backend)
    for start, end in spans(text, encoder.offsets([text])[0], 32)[1:-1]:
        assert text[start].isspace() or text[start - 1].isspace()
        assert text[end - 1].isspace() or text[end].isspace()
