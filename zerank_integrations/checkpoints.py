"""The published checkpoints, the embedded one, what names a model, and how a folder says which layout it has."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from zerank_integrations.errors import CheckpointRefused, ModelUnreachable

DEFAULT = "zeroentropy/zerank-1-small-reranker"

# Decoders whose equality with the plain forward pass was tested; an encoder would read the prompt and score noise.
DECODERS = ("qwen3", "qwen2", "llama", "mistral")

ZELO_MINI = Path(__file__).parent / "embedded" / "zelo-mini"

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint this package knows by name.

    Attributes:
        name: the short name, also the key of its golden rows.
        repository: the Hub id.
        revision: the commit the facts below were seen at, downloaded unless another is asked for.
        base: the model it was fine-tuned from.
        parameters: their number.
        context: tokens of the longest prompt it was made for.
        licence: SPDX id, with what it was before.
        older_names: Hub ids that still redirect to it.
        folder: where it lies inside this package, for the embedded one.
        notice: what a user must know before trusting its scores.
    """

    name: str
    repository: str
    revision: str | None
    base: str
    parameters: int
    context: int
    licence: str
    older_names: tuple[str, ...] = ()
    folder: Path | None = None
    notice: str | None = None


ZELO_MINI_NOTICE = f'zelo-mini is a demonstration model of a few million parameters; for real use: Reranker("{DEFAULT}")'

CHECKPOINTS = (
    Checkpoint(
        name="zerank-1-small",
        repository="zeroentropy/zerank-1-small-reranker",
        revision="a65fd51c450e9b47fdddab98e31166ecad21af8d",
        base="Qwen/Qwen3-1.7B",
        parameters=1_720_577_024,
        context=32_768,
        licence="Apache-2.0",
        older_names=("zeroentropy/zerank-1-small",),
    ),
    Checkpoint(
        name="zerank-1",
        repository="zeroentropy/zerank-1-reranker",
        revision="d03c467e29e29c0a16a130a86ce3b62d30116a2c",
        base="Qwen/Qwen3-4B",
        parameters=4_022_468_096,
        context=32_768,
        licence="Apache-2.0 (CC-BY-NC-4.0 before 2026-07-24)",
        older_names=("zeroentropy/zerank-1",),
    ),
    Checkpoint(
        name="zerank-2",
        repository="zeroentropy/zerank-2-reranker",
        revision="5eae30d5ee3c6b2df2ef6d723bde45172d761c4c",
        base="Qwen/Qwen3-4B",
        parameters=4_022_468_096,
        context=32_768,
        licence="Apache-2.0 (CC-BY-NC-4.0 before 2026-07-24)",
        older_names=("zeroentropy/zerank-2",),
    ),
    Checkpoint(
        name="zelo-mini",
        repository="zelo-mini",
        revision=None,
        base="weights written by a program of this project, then trained",
        parameters=6_032_640,
        context=4_096,
        licence="Apache-2.0",
        folder=ZELO_MINI,
        notice=ZELO_MINI_NOTICE,
    ),
)


def known(model: str) -> Checkpoint | None:
    """The checkpoint of that name, Hub id or older Hub id; None for anything else."""
    for checkpoint in CHECKPOINTS:
        if model in (checkpoint.name, checkpoint.repository, *checkpoint.older_names):
            return checkpoint
    return None


@dataclass(frozen=True, slots=True)
class Source:
    """What decides which weights are in memory and how: two equal sources can share one model."""

    model: str
    revision: str | None = None
    base: str | None = None
    device: str | None = None
    dtype: str = "auto"
    attn_implementation: str | None = None
    cache_folder: str | None = None
    local_files_only: bool = False
    # How the files are fetched, not which: Haystack always passes one, the others leave it to the environment.
    token: str | bool | None = field(default=None, repr=False, compare=False)


class Layout(StrEnum):
    """The forms in which a zerank checkpoint is found."""

    CAUSAL_LM = "causal LM"
    SENTENCE_TRANSFORMERS = "sentence-transformers stack"
    LORA = "LoRA adapter"
    SEQUENCE_CLASSIFICATION = "sequence classification"


@dataclass(frozen=True, slots=True)
class Recognised:
    """A folder whose layout is known.

    Attributes:
        folder: where it lies.
        layout: its form.
        weights: the folder that holds config.json and the weights (inside the stack's first module, say).
        config: config.json, or adapter_config.json of a LoRA adapter.
        yes: the id of "Yes" that a sentence-transformers stack names, to be compared with the tokenizer's.
    """

    folder: Path
    layout: Layout
    weights: Path
    config: dict[str, Any]
    yes: int | None = None


def recognise(folder: Path) -> Recognised:
    """Tell a folder's layout from its files, before anything is loaded.

    Raises:
        ModelUnreachable: there is no such folder, or nothing of a model in it.
        CheckpointRefused: it is no layout that could score right; the message names the remedy.
    """
    try:
        return _recognise(folder)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        msg = (
            f"the JSON files of {folder} have not the form of a checkpoint's ({type(error).__name__}: {error}); expected "
            "objects as transformers, sentence-transformers or peft write them. Download the checkpoint again"
        )
        raise CheckpointRefused(msg) from error


def _recognise(folder: Path) -> Recognised:
    if not folder.is_dir():
        msg = f"{folder} is not a folder; expected one with a checkpoint's config.json and safetensors weights"
        raise ModelUnreachable(msg)
    if (folder / "adapter_config.json").is_file():
        yes = _stack(folder)[1] if (folder / "modules.json").is_file() else None
        return Recognised(folder, Layout.LORA, folder, _adapter(folder), yes)
    if (folder / "modules.json").is_file():
        weights, yes = _stack(folder)
        return Recognised(folder, Layout.SENTENCE_TRANSFORMERS, weights, _decoder(weights, ("ForCausalLM",)), yes)
    config = _decoder(folder, ("ForCausalLM", "ForSequenceClassification"))
    classifier = config["architectures"][0].endswith("ForSequenceClassification")
    return Recognised(folder, Layout.SEQUENCE_CLASSIFICATION if classifier else Layout.CAUSAL_LM, folder, config)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, each of which is there.

    Raises:
        CheckpointRefused: pickled weights, a missing shard, or none at all.
    """
    index = folder / WEIGHTS_INDEX
    if index.is_file():
        try:
            files = [folder / name for name in sorted(set(_json(index)["weight_map"].values()))]
        except (KeyError, TypeError, AttributeError) as error:
            msg = f"{index} has no weight_map; expected the names of the shards. Download the checkpoint again"
            raise CheckpointRefused(msg) from error
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            msg = (
                f"{folder} lacks the shards {missing} that {WEIGHTS_INDEX} names; expected all {len(files)}. Download it again"
            )
            raise CheckpointRefused(msg)
        return files
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickled:
        msg = (
            f"{folder} holds pickled weights {pickled}, which can run code when loaded; expected safetensors. Convert them "
            "where you trust them: AutoModelForCausalLM.from_pretrained(old, use_safetensors=False).save_pretrained(new)"
        )
        raise CheckpointRefused(msg)
    found = sorted(path.name for path in folder.iterdir())[:8]
    msg = f"{folder} holds no weights (found {found}); expected {WEIGHTS} or {WEIGHTS_INDEX}. Download the checkpoint again"
    raise CheckpointRefused(msg)


def _json(path: Path) -> Any:  # noqa: ANN401 - JSON is what it is
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        msg = f"{path} cannot be read as JSON ({error}); expected a checkpoint's file. Download the checkpoint again"
        raise CheckpointRefused(msg) from error


def _decoder(folder: Path, heads: tuple[str, ...]) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        found = sorted(entry.name for entry in folder.iterdir())[:8]
        msg = (
            f"{folder} holds no config.json (found {found}); expected a checkpoint: a causal LM, a sentence-transformers "
            "stack, a LoRA adapter or a sequence classifier. Is it the right folder?"
        )
        raise ModelUnreachable(msg)
    config = _json(path)
    architecture = (config.get("architectures") or ["none"])[0]
    if config.get("model_type") not in DECODERS or not architecture.endswith(heads):
        msg = (
            f"{folder} is a {config.get('model_type')} model with architecture {architecture}; expected a decoder "
            f"({', '.join(DECODERS)}) with {' or '.join(heads)}. zerank checkpoints are Qwen3 decoders: load encoders with "
            "sentence-transformers' CrossEncoder"
        )
        raise CheckpointRefused(msg)
    return config


def _adapter(folder: Path) -> dict[str, Any]:
    if not (folder / "adapter_model.safetensors").is_file():
        msg = (
            f"{folder} has adapter_config.json but no adapter_model.safetensors; expected safetensors weights. "
            "Save the adapter again with peft: model.save_pretrained(folder)"
        )
        raise CheckpointRefused(msg)
    config = _json(folder / "adapter_config.json")
    if config.get("task_type") == "SEQ_CLS":
        msg = (
            f"{folder} is an adapter of a sequence classifier (task_type SEQ_CLS), whose head would be newly initialised over "
            "a causal base; expected an adapter trained on the causal LM. Merge it into its classifier and pass that folder"
        )
        raise CheckpointRefused(msg)
    return config


def _stack(folder: Path) -> tuple[Path, int]:
    """The folder of the stack's transformer and the id of "Yes" its LogitScore reads."""
    modules = _json(folder / "modules.json")
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    if kinds != ["Transformer", "LogitScore"]:
        msg = (
            f"{folder} is a sentence-transformers stack of {kinds}; expected ['Transformer', 'LogitScore'], which reads one "
            "token's logit as zerank-2 does. Load other stacks with sentence-transformers' CrossEncoder"
        )
        raise CheckpointRefused(msg)
    score = _json(folder / modules[1]["path"] / "config.json")
    if score.get("false_token_id") is not None:
        msg = (
            f"{folder} scores the difference of two tokens (true {score['true_token_id']}, false {score['false_token_id']}); "
            'expected the logit of "Yes" alone. It is another kind of reranker: load it with '
            "sentence-transformers' CrossEncoder"
        )
        raise CheckpointRefused(msg)
    return folder / modules[0]["path"], score["true_token_id"]
