"""The tiny checkpoints are what they claim to be, and the two references agree on them."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests import reference, tiny

Folder = Callable[[str], Path]
PAIRS = reference.random_pairs(50, seed=0)


def noise_floor(logits: list[float]) -> float:
    """What two float32 computations of these logits may differ by: 1e-5 of their standard deviation."""
    return 1e-5 * torch.tensor(logits, dtype=torch.float64).std().item()


@pytest.fixture(scope="module")
def logits(tiny_causal_lm: Path) -> list[float]:
    """The reference logits of PAIRS."""
    return reference.reference_logits(tiny_causal_lm, tiny.tokenizer(), PAIRS)


# ---------------------------------------------------------------------------------------------------------- tokenizer


def test_auto_tokenizer_loads_the_saved_tokenizer_unchanged(tiny_causal_lm: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(tiny_causal_lm)
    for query, document in PAIRS + reference.control_token_pairs(50, seed=0):
        text = query + document
        assert loaded(text)["input_ids"] == tiny.backend().encode(text).ids
        assert loaded.decode(loaded(text)["input_ids"]) == unicodedata.normalize("NFC", text)


def test_words_of_the_prompt_are_single_entries_of_the_vocabulary() -> None:
    vocabulary = tiny.backend().get_vocab(with_added_tokens=False)
    for word in ("Yes", "No", "yes", "no", "system", "user", "assistant"):
        assert tiny.backend().encode(word).ids == [vocabulary[word]]
    assert tiny.yes_id() == vocabulary["Yes"]


def test_added_tokens_come_after_the_vocabulary() -> None:
    tokenizer = tiny.tokenizer()
    added = tiny.SPECIAL_TOKENS + tiny.OTHER_ADDED_TOKENS
    ids = tokenizer.convert_tokens_to_ids(list(added))
    assert ids == list(range(tiny.BPE_VOCABULARY, tiny.BPE_VOCABULARY + len(added)))
    special = [tokenizer.added_tokens_decoder[i].special for i in ids]
    assert special == [True] * 3 + [False] * 3
    assert len(tokenizer) <= tiny.VOCABULARY


@pytest.mark.parametrize("roles", [("query", "document"), ("system", "user")])
def test_chat_template_renders_the_prompt(roles: tuple[str, str]) -> None:
    for query, document in PAIRS:
        messages = [{"role": role, "content": text} for role, text in zip(roles, (query, document), strict=True)]
        ids = tiny.tokenizer().apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert ids == reference.reference_ids(tiny.tokenizer(), query, document)


# --------------------------------------------------------------------------------------------------------- references


def test_sentence_transformers_agrees_with_the_reference(tiny_stack: Path, logits: list[float]) -> None:
    assert torch.tensor(logits).std() > 1
    answers = reference.sentence_transformers_logits(tiny_stack, PAIRS)
    assert answers == pytest.approx(logits, abs=noise_floor(logits))


def test_control_tokens_are_parsed_by_both_references(tiny_stack: Path) -> None:
    pairs = reference.control_token_pairs(20, seed=0)
    parsed = reference.reference_logits(tiny_stack, tiny.tokenizer(), pairs)
    answers = reference.sentence_transformers_logits(tiny_stack, pairs, batch_size=4)
    assert answers == pytest.approx(parsed, abs=noise_floor(parsed))
    literal = reference.reference_logits(tiny_stack, tiny.tokenizer(), pairs, control_tokens="literal")
    assert all(abs(p - q) > 100 * noise_floor(parsed) for p, q in zip(parsed, literal, strict=True))


def test_literal_and_parsed_ids_agree_without_control_tokens() -> None:
    tokenizer = tiny.tokenizer()
    for pair in PAIRS:
        assert reference.reference_ids(tokenizer, *pair, control_tokens="literal") == reference.reference_ids(tokenizer, *pair)


def test_only_the_document_is_cut() -> None:
    tokenizer = tiny.tokenizer()
    query, document = "open the file", "the river is cold and the moon is blue"
    whole = reference.reference_ids(tokenizer, query, document)
    rest = len(reference.reference_ids(tokenizer, query, ""))
    cut = reference.reference_ids(tokenizer, query, document, max_length=rest + 2)
    tail = tokenizer("<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    assert cut == whole[: rest + 2 - len(tail)] + tail
    with pytest.raises(ValueError, match=f"{rest} tokens are taken"):
        reference.reference_ids(tokenizer, query, document, max_length=rest)


def test_random_pairs_are_repeatable_and_varied() -> None:
    pairs = reference.random_pairs(200, seed=1)
    assert pairs == reference.random_pairs(200, seed=1) != reference.random_pairs(200, seed=2)
    lengths = [len(reference.reference_ids(tiny.tokenizer(), *pair)) for pair in pairs]
    assert 1000 < max(lengths) < 2000 < tiny.CONTEXT
    assert all(query.strip() for query, _ in pairs)
    assert any(document == "" for _, document in pairs)
    assert any(document and not document.strip() for _, document in pairs)
    texts = "".join(query + document for query, document in pairs)
    assert not any(token in texts for token in tiny.SPECIAL_TOKENS + tiny.OTHER_ADDED_TOKENS)
    texts.encode()  # raises on a lone surrogate


# ---------------------------------------------------------------------------------------------------- accepted layouts


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", [build.__name__ for build in tiny.SAME_LOGITS])
def test_layouts_carry_equal_weights(tiny_folder: Folder, name: str) -> None:
    weights = weights_of(tiny_folder(name))
    head = weights.pop("score.weight", None)
    expected = tiny.base_model().state_dict()
    del expected["lm_head.weight"]  # tied
    assert weights.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(weights[key].float(), tensor), key
    yes = expected["model.embed_tokens.weight"][tiny.yes_id()]
    scale = {"sequence_classification": 5, "sequence_classification_unscaled": 1}
    assert head is None if name not in scale else torch.equal(head, yes[None] / scale[name])


def test_sharded_layout_has_shards(tiny_folder: Folder) -> None:
    assert len(list(tiny_folder("sharded").glob("model-*.safetensors"))) > 1
    assert (tiny_folder("sharded") / "model.safetensors.index.json").exists()


@pytest.mark.parametrize(("name", "scale"), [("", 5), ("_unscaled", 1)])
def test_classifier_scores_are_scaled_logits(tiny_folder: Folder, logits: list[float], name: str, scale: float) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_folder("sequence_classification" + name))
    tokenizer = tiny.tokenizer()
    with torch.inference_mode():
        ids = [torch.tensor([reference.reference_ids(tokenizer, *pair)]) for pair in PAIRS]
        scores = torch.stack([model(input_ids=one).logits[0, 0] for one in ids])
    torch.testing.assert_close(scores.sigmoid(), torch.tensor(logits).div(scale).sigmoid(), rtol=0, atol=1e-6)


def test_adapter_layouts_equal_the_merged_model(tiny_folder: Folder, logits: list[float]) -> None:
    adapter, tokenizer = tiny_folder("lora"), tiny.tokenizer()
    base = AutoModelForCausalLM.from_pretrained(adapter.parent / "base")
    with tiny.peft_warnings():
        adapted = reference.reference_logits(PeftModel.from_pretrained(base, adapter), tokenizer, PAIRS)
    merged = reference.reference_logits(adapter.parent / "merged", tokenizer, PAIRS)
    assert adapted == pytest.approx(merged, abs=noise_floor(merged))
    stacked = reference.sentence_transformers_logits(tiny_folder("lora_in_stack"), PAIRS)
    assert stacked == pytest.approx(merged, abs=noise_floor(merged))
    assert (torch.tensor(merged) - torch.tensor(logits)).abs().mean() > 0.1
    assert not list(adapter.glob("*token*"))


def test_remote_code_of_auto_map_would_be_noticed(tmp_path: Path) -> None:
    folder = tiny.causal_lm_auto_map(tmp_path / "model")
    assert json.loads((folder / "config.json").read_text())["auto_map"]
    with pytest.raises(SystemExit):
        exec((folder / "modeling_x.py").read_text(), {})
    assert (folder / "remote_code_ran").exists()


# -------------------------------------------------------------------------------------------------- layouts to refuse


@pytest.mark.parametrize(("name", "lost"), [("headless", "lm_head.weight"), ("seqcls_without_score", "score.weight")])
def test_a_loader_makes_up_the_lost_head(tiny_folder: Folder, name: str, lost: str) -> None:
    auto = AutoModelForCausalLM if name == "headless" else AutoModelForSequenceClassification
    _, info = auto.from_pretrained(tiny_folder(name), output_loading_info=True)
    assert set(info["missing_keys"]) == {lost}


def test_broken_folders_are_broken(tiny_folder: Folder) -> None:
    assert not list(tiny_folder("pickle_only").glob("*.safetensors"))
    assert torch.load(tiny_folder("pickle_only") / "pytorch_model.bin", weights_only=True)
    assert not list(tiny_folder("empty_folder").iterdir())
    index = json.loads((tiny_folder("missing_shard") / "model.safetensors.index.json").read_text())
    absent = [f for f in set(index["weight_map"].values()) if not (tiny_folder("missing_shard") / f).exists()]
    assert len(absent) == 1
    lost = tiny.base_model().state_dict().keys() - weights_of(tiny_folder("truncated_weights")).keys()
    assert lost == {"lm_head.weight", "model.layers.1.mlp.up_proj.weight"}
    for name in ("corrupt_weights", "lfs_pointer"):
        with pytest.raises(SafetensorError):
            safe_open(tiny_folder(name) / "model.safetensors", "pt")


@pytest.mark.parametrize("name", ["other_template", "other_template_fixed_system"])
@pytest.mark.parametrize("roles", [("query", "document"), ("system", "user")])
def test_other_templates_render_another_prompt(tiny_folder: Folder, name: str, roles: tuple[str, str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder(name))
    messages = [{"role": roles[0], "content": "q"}, {"role": roles[1], "content": "d"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids != reference.reference_ids(tokenizer, "q", "d")


def test_no_chatml_tokenizer_takes_control_tokens_for_text(tiny_folder: Folder) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder("no_chatml"))
    assert len(tokenizer.encode("<|im_start|>")) > 1
    assert len(tokenizer.encode("<|endoftext|>")) == 1


def test_encoder_loads_as_a_cross_encoder(tiny_folder: Folder) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_folder("encoder"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder("encoder"))
    assert model(**tokenizer("a query", "a document", return_tensors="pt")).logits.shape == (1, 1)


def test_yes_no_stack_scores_a_difference(tiny_folder: Folder, logits: list[float]) -> None:
    answers = reference.sentence_transformers_logits(tiny_folder("yes_no_stack"), PAIRS[:5])
    assert all(abs(a - b) > 0.01 for a, b in zip(answers, logits, strict=False))


# ----------------------------------------------------------------------------------------------------- other families


@pytest.mark.parametrize("name", [build.__name__ for build in tiny.OTHER_FAMILIES])
def test_other_families_tell_documents_apart(tiny_folder: Folder, name: str) -> None:
    logits = reference.reference_logits(tiny_folder(name), tiny.tokenizer(), PAIRS[:20])
    assert torch.tensor(logits).std() > 0.5


@pytest.mark.parametrize(("name", "unlimited"), [("qwen3_sliding", "causal_lm"), ("mistral_sliding", "mistral")])
def test_the_window_takes_effect(tiny_folder: Folder, name: str, unlimited: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder(name))
    full = AutoModelForCausalLM.from_pretrained(tiny_folder(unlimited))
    ids = torch.tensor([reference.reference_ids(tiny.tokenizer(), "open the file", "the moon is blue " * 40)])
    with torch.inference_mode():
        assert (model(input_ids=ids).logits[0, -1] - full(input_ids=ids).logits[0, -1]).abs().max() > 0.01
