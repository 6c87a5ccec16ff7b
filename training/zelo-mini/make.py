"""Make zelo-mini: tokenizer, circuit, a short training, calibration, checkpoint folder, figures.

    python training/zelo-mini/make.py --collections DIR
    python training/zelo-mini/make.py --collections DIR --evaluate-only --evaluate test

``DIR`` holds collections in BEIR layout (scifact, medquad, acord, tatqa, cosqa; cranfield and legalbench-rag-mini, if
there, are evaluated on and otherwise never read). Without it the docstrings of the standard library are all there is.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from beir import DOCSTRINGS, NEVER_SEEN, TRAINED_ON, Collection, read, read_docstrings
from circuit import CONSTANT, MAX_LENGTH, MEANING, write_circuit
from lexicon import read_lexicon
from safetensors.torch import save_file
from scipy.optimize import minimize
from tokenizer import render, save_tokenizer, train_tokenizer
from tokenizers import Tokenizer
from train import RELEVANCE_SCALE, Figures, Prompts, evaluate, evaluate_at, score, train
from transformers import Qwen3ForCausalLM

DESTINATION = Path(__file__).parents[2] / "zerank_integrations" / "embedded" / "zelo-mini"
VOCABULARY = 12_288
SEED = 0
DEPTHS = (30, 50)  # how many of BM25's documents are reranked when reporting

GOLDEN_PAIRS = (
    ("What is 2+2?", "4"),
    ("read a CSV file into dictionaries", "csv.DictReader(f, fieldnames=None)\nMaps each row of a CSV file to a dictionary."),
    ("read a CSV file into dictionaries", "heapq.heappush(heap, item)\nPush item onto heap, maintaining the heap invariant."),
    ("symptoms of iron deficiency", "Low iron causes fatigue, pale skin and shortness of breath. The symptoms vary."),
    ("symptoms of iron deficiency", "The quarterly report shows a net loss of 3.2 million dollars."),
    ("total revenue 2019", "Total revenue in 2019 was $1,496.5 million, against $1,202.9 million in 2018."),
    ("total revenue 2019", ""),
    ("limitation of liability", "In no event shall either party be liable for indirect or consequential damages."),
    ("limitation of liability", "Limitation of liability. The liability of each party is limited to the fees paid."),
    ("Größe der Übertragung", "Eine Übertragung von 3 GB dauert lange. 日本語 😀"),
    ("remove duplicates from a list", "def unique(items):\n    return list(dict.fromkeys(items))"),
    ("repeat", "repeat repeat repeat repeat repeat repeat repeat repeat"),
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every stage and print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--collections", type=Path, help="folder of BEIR-layout collections; absent: docstrings alone")
    parser.add_argument("--out", type=Path, default=DESTINATION, help="checkpoint folder to write")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="tokens, control tokens included")
    parser.add_argument("--steps", type=int, default=1000, help="training steps of 32 prompts; 0 keeps the compiled weights")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--evaluate", choices=("none", "dev", "test"), default="dev", help="which split to report on")
    parser.add_argument("--evaluate-only", action="store_true", help="report on the checkpoint in --out, make nothing")
    parser.add_argument("--queries", type=int, help="evaluate on at most so many queries of each collection")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    started = time.monotonic()
    if options.evaluate_only:
        report(options.out, options.collections, options.evaluate, options.queries)
        return

    collections = read_training_collections(options.collections)
    tell(started, f"read {', '.join(f'{c.name} ({len(c.documents):,} documents)' for c in collections)}")
    tokenizer = train_tokenizer((text for c in collections for text in c.documents), options.vocabulary)
    tell(started, f"tokenizer of {tokenizer.get_vocab_size():,} tokens")
    lexicon = read_lexicon(tokenizer, [c.documents for c in collections], MEANING.stop - MEANING.start)
    tell(started, "document frequencies and meanings counted")
    start_id, end_id, yes_id = (tokenizer.encode(text).ids[0] for text in ("<|im_start|>", "<|im_end|>", "Yes"))
    model = write_circuit(lexicon, start_id, end_id, yes_id, seed=SEED)
    tell(started, f"circuit of {sum(p.numel() for p in model.parameters()):,} parameters written")

    prompts = Prompts(tokenizer, longest_document=320)
    if options.steps > 0:
        learning = Prompts(tokenizer, longest_document=192)
        train(model, learning, collections, steps=options.steps, seed=SEED, tell=lambda text: tell(started, text))
    development = [
        evaluate(model, prompts, c, split, top=30, queries=min(60, options.queries or 60))
        for c in collections
        for split in ("dev" if "dev" in c.splits else "train",)
        if c.splits[split].queries
    ]
    calibrate(model, prompts, collections[0], development)
    tell(started, "calibrated")
    save_checkpoint(model, tokenizer, options.out)
    tell(started, f"saved {sum(f.stat().st_size for f in options.out.iterdir()):,} bytes in {options.out.name}/")
    if options.evaluate != "none":
        report(options.out, options.collections, options.evaluate, options.queries)


def read_training_collections(folder: Path | None) -> list[Collection]:
    """The collections that are learnt from, docstrings last; of their queries the train and dev splits."""
    if folder is None:
        return [read_docstrings("train")]
    if not folder.is_dir():
        sys.exit(
            f"There is no folder {folder}, expected one that holds the BEIR-layout collections {', '.join(TRAINED_ON)}: "
            "pass another, or leave --collections out to use the standard library's docstrings alone."
        )
    return [*(read(folder / name, ("train", "dev")) for name in TRAINED_ON), read_docstrings("train")]


def calibrate(model: Qwen3ForCausalLM, prompts: Prompts, sample: Collection, figures: Sequence[Figures]) -> None:
    """Scale and shift the logit so that sigmoid(logit / 5) is about the share of relevant among BM25's candidates.

    Each collection counts alike. The scale goes into the last norm, the shift into its share of the constant.
    """
    logits = np.concatenate([f.logits for f in figures]).astype(np.float64)
    relevant = np.concatenate([f.relevant for f in figures])
    weights = np.concatenate([np.full(len(f.logits), 1 / len(f.logits)) for f in figures]) / len(figures)

    def cross_entropy(parameters: np.ndarray) -> float:
        z = parameters[0] * logits + parameters[1]
        return float(weights @ (np.logaddexp(0, z) - relevant * z))

    scale, shift = minimize(cross_entropy, [1 / RELEVANCE_SCALE, -1.0], method="Nelder-Mead").x
    weight = model.model.norm.weight.data
    weight *= RELEVANCE_SCALE * scale
    kept = weight.clone()
    # How much a unit of the constant's weight moves the logit, at the last token of real prompts.
    weight.zero_()
    weight[CONSTANT] = 1.0
    some = [prompts.ids("what is this about", text) for text in sample.documents[:32]]
    per_unit = float(score(model, some, prompts.yes).mean())
    weight.copy_(kept)
    weight[CONSTANT] += RELEVANCE_SCALE * shift / per_unit


def save_checkpoint(model: Qwen3ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the folder in zerank's layout, in bfloat16, and the golden rows computed from it in float32."""
    save_tokenizer(tokenizer, folder, MAX_LENGTH)
    tensors = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied
    }
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    model.config.architectures = ["Qwen3ForCausalLM"]
    model.config.dtype = "bfloat16"
    model.config.use_cache = True
    (folder / "config.json").write_text(model.config.to_json_string(use_diff=True), encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes files only their owner can read
    write_golden(folder)


def write_golden(folder: Path) -> None:
    """golden.json: what plain transformers computes from the folder, in float32 and (apart, as it differs) in bfloat16."""
    model, tokenizer = load(folder)
    yes = tokenizer.encode("Yes").ids[0]
    rows = []
    for query, document in GOLDEN_PAIRS:
        ids = tokenizer.encode(render(query, document)).ids
        rows.append({"query": query, "document": document, "logit": round(float(score(model, [ids], yes)[0]), 5)})
    model.to(torch.bfloat16)
    for row in rows:
        ids = tokenizer.encode(render(str(row["query"]), str(row["document"]))).ids
        row["logit_bfloat16"] = round(float(score(model, [ids], yes)[0]), 3)
    query, document = GOLDEN_PAIRS[0]
    golden = {
        "rows": rows,
        "tolerance_logit": 0.3,
        "tokenization": {
            "query": query,
            "document": document,
            "ids": tokenizer.encode(render(query, document)).ids,
            "yes_token_id": yes,
        },
    }
    (folder / "golden.json").write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load(folder: Path) -> tuple[Qwen3ForCausalLM, Tokenizer]:
    """The saved checkpoint in float32, and its tokenizer."""
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    return model, Tokenizer.from_file(str(folder / "tokenizer.json"))


def report(checkpoint: Path, folder: Path | None, split: str, queries: int | None) -> None:
    """Print NDCG@10 of BM25's top 30 and top 50 as they are, reranked, and fused with BM25, for every collection."""
    model, tokenizer = load(checkpoint)
    prompts = Prompts(tokenizer, longest_document=MAX_LENGTH - 1024)
    names = [name for name in (*TRAINED_ON, *NEVER_SEEN) if folder is not None and (folder / name).is_dir()]
    figures = {}
    for name in [*names, DOCSTRINGS]:
        if name == DOCSTRINGS:
            half = "test" if split == "test" else "train"
            figures[name] = evaluate_at(model, prompts, read_docstrings(half), half, DEPTHS, queries)
        else:
            assert folder is not None
            figures[name] = evaluate_at(model, prompts, read(folder / name, (split,)), split, DEPTHS, queries)
    for top in DEPTHS:
        tell(None, f"\nNDCG@10, BM25's top {top}, {split} split")
        for name, at in figures.items():
            tell(None, f"{name + (' (never seen)' if name in NEVER_SEEN else ''):36} {at[top]}")
        mean = np.mean([(at[top].bm25, at[top].reranked, at[top].fused) for at in figures.values()], axis=0)
        tell(None, f"{'mean':36} {'':13}   BM25 {mean[0]:.3f}   reranked {mean[1]:.3f}   fused {mean[2]:.3f}")


def tell(started: float | None, text: str) -> None:
    """One line of progress, with the seconds since ``started``."""
    sys.stdout.write(text + "\n" if started is None else f"{time.monotonic() - started:6.0f} s  {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
