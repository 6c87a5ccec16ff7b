"""zelo-mini: the circuit part by part, its tokenizer, the checkpoint folder, and the script that makes it."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Qwen3ForCausalLM

from zerank_integrations import Reranker
from zerank_integrations.prompt import PromptEncoder, prompt

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "training" / "zelo-mini"))

import beir  # noqa: E402
import circuit  # noqa: E402
import make  # noqa: E402
import tokenizer as tokenizing  # noqa: E402
import train  # noqa: E402
from lexicon import Lexicon, read_lexicon  # noqa: E402

FOLDER = ROOT / "zerank_integrations" / "embedded" / "zelo-mini"

# The circuit, part by part ------------------------------------------------------------------------------------------

WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "file",
    "files",
    "common",
    "rare",
    "tumour",
    "cancer",
    "filler",
    "other",
    "read",
    "reads",
]
RARITY = {"common": 0.1, "rare": 0.9, "file": 0.5, "files": 0.5, "filler": 0.3, "other": 0.3}


class Compiled(NamedTuple):
    """A freshly written circuit with a toy vocabulary, and what it finds in a prompt."""

    model: Qwen3ForCausalLM
    tokenizer: Tokenizer

    def states(self, query: str, document: str) -> tuple[list[str], list[torch.Tensor]]:
        encoding = self.tokenizer.encode(tokenizing.render(query, document))
        with torch.no_grad():
            output = self.model.model(torch.tensor([encoding.ids]), use_cache=False, output_hidden_states=True)
        return encoding.tokens, [state[0].float() for state in output.hidden_states]

    def found(self, dimension: int, query: str, document: str) -> dict[str, float]:
        """What layer 1 wrote into ``dimension`` at the document's words (the last of equal ones)."""
        tokens, states = self.states(query, document)
        start = tokens.index("user") + 2
        return {token: float(states[2][i, dimension]) for i, token in enumerate(tokens) if i >= start}

    def total(self, dimension: int, query: str, document: str) -> float:
        return float(self.states(query, document)[1][3][-1, dimension])


@pytest.fixture(scope="module")
def toy() -> Compiled:
    tokenizer = tokenizing.train_tokenizer([" ".join(WORDS)] * 50, 1000)
    ids = tokenizer.get_vocab()
    size = tokenizer.get_vocab_size()
    stem = np.arange(size)
    stem[ids["files"]], stem[ids["reads"]] = ids["file"], ids["read"]
    rarity = np.zeros(size)
    rarity[[ids[word] for word in (*WORDS, *tokenizing.ROLE_WORDS)]] = 0.4
    for word, value in RARITY.items():
        rarity[ids[word]] = value
    meaning = np.random.default_rng(1).normal(size=(size, circuit.MEANING.stop - circuit.MEANING.start))
    meaning[ids["cancer"]] = meaning[ids["tumour"]] + 0.5 * meaning[ids["cancer"]]
    meaning /= np.linalg.norm(meaning, axis=1, keepdims=True)
    start, end, yes = (tokenizer.encode(text).ids[0] for text in ("<|im_start|>", "<|im_end|>", "Yes"))
    return Compiled(circuit.write_circuit(Lexicon(stem, rarity, meaning), start, end, yes), tokenizer)


def test_every_embedding_has_root_mean_square_one(toy: Compiled) -> None:
    rms = toy.model.model.embed_tokens.weight.detach().pow(2).mean(1).sqrt()
    assert torch.allclose(rms, torch.ones_like(rms), atol=1e-4)


def test_turn_head_tells_document_from_query(toy: Compiled) -> None:
    tokens, states = toy.states("alpha beta", "gamma delta")
    flags = states[1][:, circuit.IN_DOCUMENT]
    end = tokens.index("<|im_end|>")
    assert flags[:end].abs().max() < 1e-3
    assert (flags[end:] - circuit.IN_DOCUMENT_VALUE).abs().max() < 1e-3


@pytest.mark.parametrize("before", [0, 30, 1000])
def test_previous_token_head_brings_the_code_before_at_any_position(toy: Compiled, before: int) -> None:
    tokens, states = toy.states("alpha", "common " * before + "gamma delta gamma alpha delta gamma")
    previous = states[1][:, circuit.PREVIOUS]
    last = len(tokens) - 1 - tokens[::-1].index("gamma")
    first, second = last - 5, last - 3
    similarity = torch.cosine_similarity
    assert tokens[first - 1 : last + 1] == [tokens[first - 1], "gamma", "delta", "gamma", "alpha", "delta", "gamma"]
    assert similarity(previous[second], previous[last], dim=0) > 0.99  # both after delta
    assert similarity(previous[second], previous[first], dim=0) < 0.6
    role = states[1][:, circuit.ROLE]
    assert [token for token, flag in zip(tokens, role, strict=True) if flag > 0.5] == [
        "<|im_start|>", "system", "user", "assistant",
    ]  # fmt: skip


@pytest.mark.parametrize("before", [0, 300, 3000])
def test_match_head_finds_equal_words_and_their_stems_only(toy: Compiled, before: int) -> None:
    found = toy.found(circuit.MATCHED, "alpha files rare common", "delta " * before + "alpha file gamma rare common tumour")
    scale = found["rare"] / 0.9
    assert 0.85 < scale < 1
    for word, rarity in {"alpha": 0.4, "file": 0.5, "rare": 0.9, "common": 0.1, "gamma": 0, "tumour": 0, "delta": 0}.items():
        if word in found:
            assert found[word] == pytest.approx(rarity * scale, abs=0.02), word


def test_match_head_does_not_find_the_document_in_itself_nor_the_names_of_the_turns(toy: Compiled) -> None:
    found = toy.found(circuit.MATCHED, "alpha", "beta beta beta system user assistant")
    assert max(abs(value) for value in found.values()) < 0.01
    assert toy.found(circuit.MATCHED, "system", "beta system")["system"] > 0.3


def test_repeat_head_counts_occurrences(toy: Compiled) -> None:
    novelty = []
    for times in (1, 2, 3, 6):
        novelty.append(toy.found(circuit.NOVELTY, "alpha", "gamma " + "beta gamma " * 3 + "alpha " * times)["alpha"])
    assert novelty == pytest.approx([0.9 / (1 + n) for n in (1, 2, 3, 6)], rel=0.02)


def test_phrase_head_wants_the_same_word_before(toy: Compiled) -> None:
    assert toy.found(circuit.PHRASE, "read file alpha", "gamma read file delta")["file"] > 0.8
    assert toy.found(circuit.PHRASE, "read file alpha", "read gamma file delta")["file"] < 0.4
    assert toy.found(circuit.PHRASE, "read file alpha", "gamma read delta")["delta"] < 0.4


def test_related_head_finds_what_is_near_in_meaning(toy: Compiled) -> None:
    found = toy.found(circuit.RELATION, "cancer alpha", "tumour gamma cancer")
    assert found["tumour"] > 0.8 and found["cancer"] > 0.8 and found["gamma"] < 0.2


def test_sums_add_what_was_found_by_rarity(toy: Compiled) -> None:
    def total(document: str) -> float:
        return toy.total(circuit.SUM_MATCHED, "alpha rare common", document)

    nothing, common, alpha, rare, both = map(total, ("gamma", "common", "alpha", "rare", "alpha rare"))
    assert nothing < 0.02
    assert nothing < common < alpha < rare < both
    assert alpha / rare == pytest.approx(0.4 / 0.9, rel=0.25)
    assert both == pytest.approx(alpha + rare, rel=0.1)


def test_sums_saturate_with_repetition(toy: Compiled) -> None:
    totals = [toy.total(circuit.SUM_MATCHED, "alpha", "alpha " * times) for times in range(1, 8)]
    gains = np.diff(totals)
    assert (gains > 0).all() and (np.diff(gains) < 0).all()
    assert gains[0] < 0.6 * totals[0] and totals[-1] < 3 * totals[0]
    # Two different words are worth more than one of them five times.
    pair = toy.total(circuit.SUM_MATCHED, "alpha beta", "alpha beta")
    assert pair > toy.total(circuit.SUM_MATCHED, "alpha beta", "alpha " * 3)


def test_sums_shrink_in_long_documents(toy: Compiled) -> None:
    short = toy.total(circuit.SUM_MATCHED, "alpha beta", "alpha beta filler other")
    long = toy.total(circuit.SUM_MATCHED, "alpha beta", "alpha beta " + "filler other " * 300)
    assert 0.5 * short < long < short


def test_query_sum_adds_the_query_alone(toy: Compiled) -> None:
    one = toy.total(circuit.SUM_QUERY, "alpha", "gamma")
    assert toy.total(circuit.SUM_QUERY, "alpha", "gamma delta alpha rare") == pytest.approx(one, rel=0.02)
    assert toy.total(circuit.SUM_QUERY, "alpha rare", "gamma") == pytest.approx(one * 1.3 / 0.4, rel=0.1)


def test_compiled_logit_ranks_and_survives_bfloat16(toy: Compiled) -> None:
    documents = ["alpha rare file", "alpha file", "rare", "common alpha", "common", "gamma delta"]
    ids = [toy.tokenizer.encode(tokenizing.render("alpha rare file common", document)).ids for document in documents]
    yes = toy.tokenizer.encode("Yes").ids[0]
    values = train.score(toy.model, ids, yes)
    assert values[0] == values.max() and values[-1] == values.min()
    halved = Qwen3ForCausalLM(toy.model.config).eval()
    halved.load_state_dict(toy.model.state_dict())
    half = train.score(halved.to(torch.bfloat16), ids, yes)
    assert list(np.argsort(half)) == list(np.argsort(values))


def test_rarity_and_meaning_are_counted_per_stem() -> None:
    texts = [
        ["the file was read", "the files are read", "the dog sleeps", "the cat sleeps", "the dog runs"] * 20,
        ["the tumour grows", "the cancer grows", "the dog grows"] * 20,
    ]
    tokenizer = tokenizing.train_tokenizer([text for part in texts for text in part], 1000)
    lexicon = read_lexicon(tokenizer, texts, 8)
    ids = tokenizer.get_vocab()
    assert lexicon.stem[ids["file"]] == lexicon.stem[ids["files"]] != lexicon.stem[ids["dog"]]
    assert lexicon.rarity[ids["the"]] == 0 < lexicon.rarity[ids["dog"]] < lexicon.rarity[ids["cat"]] <= 1
    lengths = np.linalg.norm(lexicon.meaning, axis=1)
    assert np.all(np.isclose(lengths, 1) | np.isclose(lengths, 0))


# The tokenizer ------------------------------------------------------------------------------------------------------


def _random_texts(number: int, seed: int) -> Iterator[str]:
    random_ = random.Random(seed)
    alphabets: Sequence[Sequence[str]] = (
        [chr(c) for c in range(0x20, 0x7F)],
        list("abcdeABCDE   \n\t\r.,_-()"),
        [chr(c) for c in range(0xA0, 0x250)],
        [chr(c) for c in range(0x300, 0x330)] + list("aeiou "),
        [chr(c) for c in (*range(0x370, 0x400), *range(0x4E00, 0x4E40), *range(0x1F600, 0x1F640))],
        [*"\u2028\u2029\x0b\x0c\x1c\x1d\x85\u3000\u200b\u2060\ufeffİẞſΣ", " ", "x", "Y"],
        ["<|im_end|>", "<|im_start|>", "user", "System", "\n", "Yes"],
    )
    for _ in range(number):
        alphabet = random_.choice(alphabets)
        text = "".join(random_.choice(alphabet) for _ in range(random_.randrange(40)))
        yield text.replace("<|", "<") if random_.random() < 0.5 else text


@pytest.fixture(scope="module")
def backend() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def test_training_a_tokenizer_twice_gives_the_same(toy: Compiled) -> None:
    again = tokenizing.train_tokenizer([" ".join(WORDS)] * 50, 1000)
    assert again.to_str() == toy.tokenizer.to_str()


def test_pieces_equal_the_whole_prompt(backend: Tokenizer) -> None:
    encoder = PromptEncoder(backend, control_tokens="parse")
    assert encoder.pieces
    for query, document in zip(_random_texts(2000, 1), _random_texts(2000, 2), strict=True):
        assert encoder.encode(query, [document], 4096)[0].ids == backend.encode(prompt(query, document)).ids


def test_text_never_yields_a_control_id(backend: Tokenizer) -> None:
    control = {backend.token_to_id(token) for token in tokenizing.CONTROL_TOKENS}
    assert control == {backend.get_vocab_size() - 2, backend.get_vocab_size() - 1}
    plain = Tokenizer.from_str(json.dumps(json.loads(backend.to_str()) | {"added_tokens": []}))
    for text in (*_random_texts(500, 3), *tokenizing.CONTROL_TOKENS, "<|im_start|>system\n<|im_end|>"):
        assert not control & set(plain.encode(text).ids)
    assert plain.encode("Yes").ids == backend.encode("Yes").ids
    assert len(plain.encode("Yes").ids) == 1


def test_every_text_is_encoded_without_loss_but_case_and_spaces(backend: Tokenizer) -> None:
    for text in _random_texts(500, 4):
        encoding = backend.encode(text, add_special_tokens=False)
        covered = "".join(text[a:b] for a, b in encoding.offsets)
        assert set(text) - set(covered) <= {c for c in text if c.isspace()}
        assert None not in encoding.tokens


def test_words_have_one_spelling_wherever_they_stand(backend: Tokenizer) -> None:
    reader = backend.encode("reader").ids
    assert len(reader) == 1
    for text in ("dict reader", "DictReader", "csv.Reader", "(reader", "\nREADER", "get_reader"):
        assert backend.encode(text).ids[-1:] == reader, text
    assert backend.encode("HTTPServer").tokens == ["http", "server"]


def test_autotokenizer_reads_the_file_as_it_is(backend: Tokenizer) -> None:
    auto = AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)
    for query, document in zip(_random_texts(200, 5), _random_texts(200, 6), strict=True):
        text = tokenizing.render(query, document)
        assert auto(text)["input_ids"] == backend.encode(text).ids
    assert len(auto) == backend.get_vocab_size()


@pytest.mark.parametrize("roles", [("system", "user"), ("query", "document")])
def test_chat_template_renders_the_prompt(roles: tuple[str, str]) -> None:
    auto = AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)
    messages = [{"role": role, "content": text} for role, text in zip(roles, (" a {b}\n", "\tc\n\nd "), strict=True)]
    assert auto.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == prompt("a {b}", "c\n\nd")


# The checkpoint folder ----------------------------------------------------------------------------------------------


def test_folder_is_complete_and_small() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert names >= {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "golden.json",
    }  # fmt: skip
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 20_000_000
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert config["max_position_embeddings"] == 4096
    assert config["vocab_size"] <= 16_384


@pytest.mark.parametrize(("dtype", "key", "tolerance"), [("float32", "logit", 0.01), ("bfloat16", "logit_bfloat16", 0.3)])
def test_golden_rows_are_reproduced(dtype: str, key: str, tolerance: float) -> None:
    golden = json.loads((FOLDER / "golden.json").read_text(encoding="utf-8"))
    assert golden["tolerance_logit"] == 0.3
    with Reranker(str(FOLDER), dtype=dtype, device="cpu") as reranker:
        for row in golden["rows"]:
            logit = reranker.rank(row["query"], [row["document"]])[0].logit
            assert logit == pytest.approx(row[key], abs=tolerance), row
            assert row["logit_bfloat16"] == pytest.approx(row["logit"], abs=1)


def test_golden_ids_are_reproduced(backend: Tokenizer) -> None:
    told = json.loads((FOLDER / "golden.json").read_text(encoding="utf-8"))["tokenization"]
    encoder = PromptEncoder(backend)
    assert encoder.yes == told["yes_token_id"]
    assert encoder.encode(told["query"], [told["document"]], 4096)[0].ids == told["ids"]


def test_checkpoint_prefers_the_document_that_answers() -> None:
    rows = json.loads((FOLDER / "golden.json").read_text(encoding="utf-8"))["rows"]
    by_query: dict[str, list[float]] = {}
    for row in rows:
        by_query.setdefault(row["query"], []).append(row["logit"])
    for query in ("read a CSV file into dictionaries", "symptoms of iron deficiency", "total revenue 2019"):
        assert by_query[query][0] > by_query[query][1] + 1, query


# The script ---------------------------------------------------------------------------------------------------------


def test_make_runs_on_the_docstrings_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = beir.read_docstrings("train")
    kept = sorted(range(len(whole.documents)), key=lambda d: len(whole.documents[d]))[1000:1100]
    split = whole.splits["train"]
    relevant = {d for grades in split.qrels.values() for d in grades}
    places = {d: i for i, d in enumerate(dict.fromkeys([*kept, *relevant]))}
    small = replace(
        whole,
        documents=[whole.documents[d] for d in places],
        splits={"train": beir.Split(split.queries, {q: {places[d]: g for d, g in r.items()} for q, r in split.qrels.items()})},
    )
    monkeypatch.setattr(make, "read_docstrings", lambda half: small)
    monkeypatch.setattr(train, "GROUPS_PER_STEP", 1)
    make.main(["--out", str(tmp_path / "made"), "--vocabulary", "1500", "--steps", "2", "--queries", "2", "--evaluate", "dev"])
    told = capsys.readouterr().out
    assert "step 2 of 2, loss" in told and "reranked" in told
    with Reranker(str(tmp_path / "made"), dtype="float32", device="cpu") as reranker:
        assert reranker.rank("read a file", ["sort a list", "read a file"])[0].index == 1


def test_absent_collections_are_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"There is no folder .*docstrings"):
        make.main(["--collections", str(tmp_path / "nowhere")])
    with pytest.raises(FileNotFoundError, match="BEIR layout"):
        beir.read(tmp_path, ("train",))


def test_never_seen_collections_are_not_trained_on() -> None:
    assert not set(beir.TRAINED_ON) & set(beir.NEVER_SEEN)
    assert set(beir.NEVER_SEEN) == {"cranfield", "legalbench-rag-mini"}
