"""`check`: what is sound passes with its figures, what is wrong fails with a remedy, what cannot be asked says why."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tests import reference, tiny
from zerank_integrations import relevance_of
from zerank_integrations.check import PUBLISHED, Check, check, golden

Folder = Callable[[str], Path]

SHARED = Path(__file__).parents[3] / "shared" / "golden" / "zerank.json"

PAIRS = [
    ("read a csv file", "csv.reader returns the rows of a file"),
    ("read a csv file", "bread and butter"),
    ("Où est le château ?", ""),
    ("red planet", "a planet near the moon, red and cold"),
]


def on_cpu(folder: Path, **options: str) -> dict[str, Check]:
    """The checks by name, computed in float32 unless told otherwise."""
    return {one.name: one for one in check(folder, **{"device": "cpu", "dtype": "float32"} | options)}


def failed(checks: dict[str, Check]) -> list[str]:
    return [name for name, one in checks.items() if not one.ok]


def skipped(checks: dict[str, Check]) -> list[str]:
    return [name for name, one in checks.items() if one.skipped]


@pytest.fixture
def folder(tiny_causal_lm: Path, tmp_path: Path) -> Path:
    """A copy of the tiny causal LM that a test may spoil."""
    return Path(shutil.copytree(tiny_causal_lm, tmp_path / "checkpoint"))


# Sound checkpoints


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("builder", "layout", "head"),
    [
        ("causal_lm", "causal LM, Qwen3ForCausalLM", "embed_tokens.weight[{yes}], tied, stored with scale 1"),
        ("sharded", "in 4 safetensors", "embed_tokens.weight[{yes}], tied, stored with scale 1"),
        ("sentence_transformers_stack", "sentence-transformers stack", "embed_tokens.weight[{yes}], tied"),
        ("sequence_classification", "sequence classification", "score.weight[0], stored with scale 0.2"),
        ("lora", "LoRA adapter over", "the merged head, row {yes}"),
    ],
)
def test_a_sound_checkpoint_of_any_layout_passes(tiny_folder: Folder, builder: str, layout: str, head: str) -> None:
    checks = on_cpu(tiny_folder(builder))
    assert failed(checks) == []
    assert set(skipped(checks)) - {"memory"} == {"tokenizer", "golden rows", "own golden rows"}
    assert layout in checks["layout"].figure
    assert head.format(yes=tiny.yes_id()) in checks["head"].figure
    assert "cosine 1.000" in checks["head"].figure
    assert "float32 on cpu" in checks["loading"].figure
    assert "209,440 parameters" in checks["size"].figure
    assert "roles query/document" in checks["template"].figure
    assert repr("<|im_start|>system\nwhich probe is this?<|im_end|>\n<|im_start|>user\n")[1:-1] in checks["template"].figure
    assert checks["prompt pieces"].figure.startswith("1,000 of 1,000")
    assert checks["control tokens"].figure.startswith("6 of 6")
    assert checks["context"].figure.startswith("4,096 tokens; a longer document is cut to a prompt of 4,096")
    assert "not a published checkpoint" in checks["golden rows"].figure
    assert all(one.figure and not one.remedy for one in checks.values())


@pytest.mark.filterwarnings("ignore::zerank_integrations.ZerankWarning")
def test_a_tokenizer_whose_pieces_differ_is_sound_but_slower(folder: Path) -> None:
    definition = json.loads((folder / "tokenizer.json").read_text())
    for token in definition["added_tokens"]:
        token["rstrip"] = True
    odd = Tokenizer.from_str(json.dumps(definition))
    PreTrainedTokenizerFast(tokenizer_object=odd, model_max_length=tiny.CONTEXT).save_pretrained(folder)
    checks = on_cpu(folder)
    assert failed(checks) == []
    assert "encoded as one string, which is slower" in checks["prompt pieces"].figure


# Wrong ones


@pytest.mark.parametrize("builder", [build.__name__ for build in tiny.REFUSED])
def test_a_refused_checkpoint_is_a_failed_check_with_a_remedy(tiny_folder: Folder, builder: str) -> None:
    *before, last = on_cpu(tiny_folder(builder)).values()
    assert all(one.ok for one in before)
    assert not last.ok
    assert last.figure
    assert last.remedy
    assert last.name in ("layout", "memory", "loading")


def test_a_model_that_is_nowhere_is_a_failed_check(tmp_path: Path) -> None:
    (only,) = on_cpu(tmp_path / "nothing").values()
    assert (only.name, only.ok) == ("location", False)
    assert "there is no folder" in only.figure
    assert "zelo-mini" in only.remedy
    (only,) = on_cpu(Path("nobody/nothing")).values()
    assert "nobody/nothing could not be had" in only.figure
    assert "pass the folder" in only.remedy


def test_a_device_that_is_not_there_is_a_failed_check(tiny_causal_lm: Path) -> None:
    checks = on_cpu(tiny_causal_lm, device="cuda:99")
    assert failed(checks) == ["memory"]
    assert "cuda:99" in checks["memory"].figure


def test_weights_larger_than_the_memory_are_not_loaded(folder: Path) -> None:
    """Four times this machine's memory, in a file with a hole."""
    numbers = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    header = json.dumps({"model.embed_tokens.weight": {"dtype": "F32", "shape": [numbers], "data_offsets": [0, 4 * numbers]}})
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    os.truncate(file, 8 + len(header) + 4 * numbers)
    checks = on_cpu(folder)
    assert failed(checks) == ["memory"]
    assert "expected to fit" in checks["memory"].remedy
    assert "loading" not in checks


def test_weights_that_are_not_finite_fail(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    checks = on_cpu(folder)
    assert failed(checks) == ["logits"]
    assert "nan" in checks["logits"].figure
    assert checks["batching"].skipped


@pytest.mark.parametrize(
    ("scale", "score", "wrong"),
    [
        (1.0, 0.2, "5"),  # the row is a fifth of the embedding, and the file says it is the embedding
        (0.2, 0.0, "not all zero"),
    ],
)
def test_a_wrong_head_fails(tiny_sequence_classification: Path, tmp_path: Path, scale: float, score: float, wrong: str) -> None:
    folder = Path(shutil.copytree(tiny_sequence_classification, tmp_path / "checkpoint"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"zerank_score_scale": scale}))
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"] *= score / 0.2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    checks = on_cpu(folder)
    assert "head" in failed(checks)
    # Without a row all logits are equal, which is wrong too.
    assert ("logits" in failed(checks)) == (score == 0)
    if score:
        assert "not 0.2 times" in checks["head"].remedy
    else:
        assert wrong in checks["head"].remedy


# Known answers


@pytest.fixture
def answers(folder: Path) -> dict[str, object]:
    """The folder's golden.json as an independent scorer would write it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    logits = reference.reference_logits(folder, tokenizer, PAIRS)
    query, document = PAIRS[0]
    return {
        "rows": [{"query": q, "document": d, "logit": logit} for (q, d), logit in zip(PAIRS, logits, strict=True)],
        "tolerance_logit": 0.001,
        "tokenization": {
            "query": query,
            "document": document,
            "ids": reference.reference_ids(tokenizer, query, document),
            "yes_token_id": tiny.yes_id(),
        },
    }


def write(folder: Path, answers: object) -> None:
    (folder / "golden.json").write_text(json.dumps(answers))


def test_a_folders_own_rows_and_ids_are_checked(folder: Path, answers: dict) -> None:
    write(folder, answers)
    checks = on_cpu(folder)
    assert failed(checks) == []
    assert skipped(checks) == ["golden rows"]
    assert checks["own golden rows"].figure.startswith("4 rows, largest difference")
    assert f"the {len(answers['tokenization']['ids'])} known ids" in checks["tokenizer"].figure


def test_a_row_may_give_the_relevance_instead(folder: Path, answers: dict) -> None:
    rows = [{"query": r["query"], "document": r["document"], "relevance": relevance_of(r["logit"])} for r in answers["rows"]]
    write(folder, {"rows": rows, "tolerance_relevance": 0.001})
    assert failed(on_cpu(folder)) == []
    rows[1]["relevance"] += 0.002
    write(folder, {"rows": rows, "tolerance_relevance": 0.001})
    checks = on_cpu(folder)
    assert failed(checks) == ["own golden rows"]
    assert "0.002 relevance, tolerance 0.001" in checks["own golden rows"].figure


def test_a_wrong_row_fails_and_is_named(folder: Path, answers: dict) -> None:
    answers["rows"][2]["logit"] += 0.5
    write(folder, answers)
    checks = on_cpu(folder)
    assert failed(checks) == ["own golden rows"]
    assert "0.5 logit, tolerance 0.001" in checks["own golden rows"].figure
    assert "'Où est le château ?', ''" in checks["own golden rows"].remedy
    assert "1 of 4 rows miss" in checks["own golden rows"].remedy


def test_wrong_ids_fail(folder: Path, answers: dict) -> None:
    answers["tokenization"]["ids"][-1] += 1
    write(folder, answers)
    assert failed(on_cpu(folder)) == ["tokenizer"]
    answers["tokenization"]["ids"][-1] -= 1
    answers["tokenization"]["yes_token_id"] += 1
    write(folder, answers)
    assert failed(on_cpu(folder)) == ["tokenizer"]


def test_a_row_has_its_own_answer_for_a_type(folder: Path, answers: dict) -> None:
    for row in answers["rows"]:
        row |= {"logit": 99.0, "logit_bfloat16": row["logit"]}
    write(folder, answers | {"tolerance_logit": 0.3})
    assert failed(on_cpu(folder, dtype="bfloat16")) == []
    assert failed(on_cpu(folder, dtype="float32")) == ["own golden rows"]


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"rows": [{"query": "q", "document": "d"}]}', '{"rows": [], "tokenization": {"query": "q"}}'],
)
def test_a_golden_file_of_another_form_is_a_failed_check(folder: Path, content: str) -> None:
    (folder / "golden.json").write_text(content)
    checks = on_cpu(folder)
    assert set(failed(checks)) == {"tokenizer", "own golden rows"}
    assert "golden.json cannot be read" in checks["own golden rows"].figure
    assert "Correct it or delete it" in checks["own golden rows"].remedy


# The published checkpoints


def test_a_folder_that_is_no_copy_of_what_it_is_said_to_be_fails(tiny_causal_lm: Path) -> None:
    checks = on_cpu(tiny_causal_lm, published_as="zerank-2")
    assert failed(checks) == ["size", "tokenizer", "golden rows"]
    assert "expected 4,022,468,096" in checks["size"].remedy
    assert "23 rows" in checks["golden rows"].figure
    assert "tolerance 0.3" in checks["golden rows"].figure
    checks = on_cpu(tiny_causal_lm, published_as="zerank-1-small")
    assert "4 rows" in checks["golden rows"].figure
    assert "relevance, tolerance 0.01" in checks["golden rows"].figure
    checks = on_cpu(tiny_causal_lm, published_as="zerank-1")
    assert "nobody has published golden rows of zerank-1" in checks["golden rows"].figure
    assert checks["golden rows"].skipped


def test_a_qwen3_vocabulary_must_give_the_published_ids(tmp_path: Path) -> None:
    """A vocabulary cut down to the words of the one pair whose ids are published, under their ids."""
    words = {"What": 3838, " is": 374, " ": 220, "2": 17, "+": 10, "?": 30, "4": 19, "\n": 198, "Yes": 9454}
    words |= {"system": 8948, "user": 872, "assistant": 77091, "[UNK]": 0}

    def build(path: Path, words: dict[str, int]) -> Path:
        backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}|\s|[^\s\p{L}\p{N}]"), "isolated")
        definition = json.loads(backend.to_str())
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        controls = {"<|im_start|>": 151644, "<|im_end|>": 151645}
        definition["added_tokens"] = [{"id": number, "content": token} | flags for token, number in controls.items()]
        definition["model"]["vocab"] |= controls
        backend = Tokenizer.from_str(json.dumps(definition))
        PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=512).save_pretrained(path)
        shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 8}
        heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
        torch.manual_seed(0)
        config = Qwen3Config(vocab_size=151_936, max_position_embeddings=512, tie_word_embeddings=True, **shape, **heads)
        Qwen3ForCausalLM(config).save_pretrained(path)
        return path

    checks = on_cpu(build(tmp_path / "right", words))
    assert failed(checks) == []
    assert "the 21 known ids" in checks["tokenizer"].figure
    assert '"Yes" 9454, <|im_start|> 151644, <|im_end|> 151645' in checks["tokenizer"].figure
    checks = on_cpu(build(tmp_path / "wrong", words | {"user": 873}))
    assert failed(checks) == ["tokenizer"]


def test_the_golden_rows_are_those_of_the_published_checkpoints() -> None:
    known = golden()
    assert set(known) == {"zerank-1-small", "zerank-2", "tokenization"}
    assert set(known) - {"tokenization"} <= set(PUBLISHED)
    assert all(known[name]["source"] for name in ("zerank-1-small", "zerank-2"))


@pytest.mark.shared
def test_the_golden_rows_are_those_beside_the_repository() -> None:
    if not SHARED.is_file():
        pytest.skip("the golden values lie beside the repository (../shared/golden); they are not there")
    theirs, ours = json.loads(SHARED.read_text()), golden()
    assert ours["tokenization"] == theirs["tokenization"]
    small, two = theirs["zerank-1-small"], theirs["zerank-2"]
    assert ours["zerank-1-small"]["rows"] == small["rows"]
    assert ours["zerank-1-small"]["tolerance_relevance"] == small["tolerance"]
    renamed = [
        {"query": r["query"], "document": r["document"], "logit": r["logit_fp32"], "logit_bfloat16": r["logit_bf16"]}
        for r in two["rows"]
    ]
    assert ours["zerank-2"]["rows"] == renamed
    assert ours["zerank-2"]["tolerance_logit"] == two["tolerance_logit"]


# Wrong arguments


def test_wrong_arguments_are_refused(tiny_causal_lm: Path) -> None:
    with pytest.raises(ValueError, match=r"zerank-3.*expected.*zerank-1-small, zerank-1, zerank-2"):
        check(tiny_causal_lm, published_as="zerank-3")
    with pytest.raises(TypeError, match="instruction"):
        check(tiny_causal_lm, instruction="be kind")
