"""From a name or folder to a decoder, its tokenizer and the float32 "Yes" row. Code in a checkpoint never runs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers.tokenization_utils_tokenizers import TokenizersBackend
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from zerank_integrations import checkpoints
from zerank_integrations.checkpoints import Layout, Recognised, Source, recognise, weight_files
from zerank_integrations.errors import CheckpointRefused, ForkedDevice, MissingPackage, ModelUnreachable, ZerankWarning
from zerank_integrations.prompt import PromptEncoder, prompt

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# The probe a chat template is rendered with. Its text is in no template.
PROBE = ("which probe is this?", "the probe of the template")

# Never ask for pickles, other runtimes' weights or code.
DOWNLOADED = ("*.json", "*.safetensors", "*.txt", "*.jinja")

FLOAT_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A checkpoint in memory.

    Attributes:
        decoder: transformers' decoder, without a language-model head, in eval mode.
        yes: the row whose dot product with the last hidden state is the logit; float32, shape (hidden,).
        tokenizer: the tokenizer's backend as it came.
        encoder: the prompt encoder with control tokens read as text.
        context: tokens of the longest prompt.
        recognised: the folder and its layout.
        template: how the prompt's template was found: the roles it renders, or that there is none.
        scale: what the stored row was multiplied with (1, or 1/5 in the sequence-classification layout); undone in `yes`.
    """

    decoder: torch.nn.Module
    yes: torch.Tensor
    tokenizer: Tokenizer
    encoder: PromptEncoder
    context: int
    recognised: Recognised
    template: str
    scale: float

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.yes.device

    @property
    def dtype(self) -> torch.dtype:
        """What the decoder computes in."""
        return next(self.decoder.parameters()).dtype


def load(source: Source, folder: Path) -> Loaded:
    """Load a checkpoint of any zerank layout from the folder where `locate` found it.

    Raises:
        ModelUnreachable: a LoRA adapter's base is neither here nor to be had.
        CheckpointRefused: it would score wrongly.
        MissingPackage: a LoRA adapter, and peft is not installed.
        ForkedDevice: the GPU was in use before this process was forked.
    """
    recognised = recognise(folder)
    device = choose_device(source.device)
    dtype = choose_dtype(source.dtype, device)
    settings: dict[str, Any] = {"dtype": dtype, "attn_implementation": source.attn_implementation or "sdpa"}

    if recognised.layout is Layout.LORA:
        weights, tokenizer_folder = _base(recognised, source)
    else:
        weights, tokenizer_folder = recognised, recognised.weights
    tokenizer = load_tokenizer(tokenizer_folder)
    template = check_template(tokenizer)
    encoder = PromptEncoder(tokenizer.backend_tokenizer)
    if not encoder.pieces:
        warnings.warn(
            f"the tokenizer of {folder} encodes pieces of a prompt otherwise than the whole, so every pair is encoded as one "
            "string: the scores are right, but slower to come by. Said once per load",
            ZerankWarning,
            stacklevel=2,
        )
    for named in {recognised.yes, weights.yes} - {None, encoder.yes}:
        msg = (
            f'{folder} reads the logit of token {named}, but its tokenizer encodes "Yes" as {encoder.yes}; '
            "expected the same id. Its tokenizer or its LogitScore belongs to another checkpoint"
        )
        raise CheckpointRefused(msg)

    model = _weights(weights, settings)
    if recognised.layout is Layout.LORA:
        model = _merged(model, folder)
        # Of the merged model: an adapter may have learnt the head too.
        row, scale = model.get_output_embeddings().weight[encoder.yes].float(), 1.0  # type: ignore[no-untyped-call]
    else:
        row, scale = _yes_row(weights, encoder.yes, tied=model.config.tie_word_embeddings)
    decoder: torch.nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    decoder = decoder.to(device).eval().requires_grad_(requires_grad=False)
    return Loaded(
        decoder=decoder,
        yes=(row / scale).detach().to(device),
        tokenizer=tokenizer.backend_tokenizer,
        encoder=encoder,
        context=context(source.model, model.config, tokenizer),
        recognised=recognised,
        template=template,
        scale=scale,
    )


def locate(model: str, source: Source) -> Path:
    """The folder of a model: the embedded one, a folder here, or a download from the Hub (or its cache).

    HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN are honoured as by every Hugging Face library.

    Raises:
        ModelUnreachable: with the cause, what the cache holds, and the ways out.
    """
    checkpoint = checkpoints.known(model)
    if checkpoint is not None and checkpoint.folder is not None:
        return checkpoint.folder
    # Not Path: a name that no file system can hold, or ~ of nobody, is no folder rather than an error.
    folder = Path(os.path.expanduser(model))
    if os.path.isdir(folder):
        return folder
    if checkpoint is None and (folder.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1):
        msg = (
            f"there is no folder {model!r}, and it is no Hub id (owner/name); expected a checkpoint's folder, a Hub id "
            f'such as {checkpoints.DEFAULT!r}, or "zelo-mini", which needs no download'
        )
        raise ModelUnreachable(msg)
    repository = checkpoint.repository if checkpoint else model
    revision = source.revision or (checkpoint.revision if checkpoint else None)
    return _download(repository, revision, source)


def choose_device(device: str | None) -> torch.device:
    """The device asked for, else CUDA, else MPS, else CPU.

    Raises:
        ValueError: there is no such device here.
        ForkedDevice: CUDA was initialised before this process was forked.
    """
    if device is None:
        available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        device = next(name for name, is_there in available.items() if is_there)
    known = f'device is {device!r}; expected "cpu", "cuda", "cuda:1" or "mps"'
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(known) from error
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise ValueError(known)
    if chosen.type == "cuda" and getattr(torch.cuda, "_is_in_bad_fork", bool)():
        msg = (
            "CUDA was in use before this process was forked and cannot be used in it; expected a fresh process. Load the "
            'model after the fork (gunicorn: without --preload), or start workers with multiprocessing\'s "spawn"'
        )
        raise ForkedDevice(msg)
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (chosen.index or 0) >= there.get(chosen.type, 1):
        msg = f"device is {device!r}, but torch sees {there}; expected one that is there. A GPU needs a torch built for it"
        raise ValueError(msg)
    return chosen


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The float type asked for; "auto" is bfloat16 where the device computes in it natively, else float32.

    Raises:
        ValueError: no such float type.
    """
    if dtype in FLOAT_TYPES:
        return FLOAT_TYPES[dtype]
    if dtype != "auto":
        msg = f"dtype is {dtype!r}; expected auto, {', '.join(FLOAT_TYPES)}"
        raise ValueError(msg)
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device)[0] >= 8
    elif device.type == "mps":
        native = torch.backends.mps.is_macos_or_newer(14, 0)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def load_tokenizer(folder: Path) -> TokenizersBackend:
    """The folder's tokenizer.

    Raises:
        CheckpointRefused: there is none, or none with the fast backend.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        # As with the weights: a foreign file can be wrong in any way.
        msg = (
            f"{folder} has no tokenizer that loads ({type(error).__name__}: {error}); expected tokenizer.json. "
            "Copy the tokenizer files of the checkpoint it was made from into the folder"
        )
        raise CheckpointRefused(msg) from error
    if not isinstance(tokenizer, TokenizersBackend):
        msg = f"{folder} has a tokenizer without the fast backend; expected tokenizer.json. Save it with a current transformers"
        raise CheckpointRefused(msg)
    return tokenizer


def check_template(tokenizer: TokenizersBackend) -> str:
    """Render the chat template with the probe and compare it with the known prompt.

    Returns:
        Which roles rendered it, or that there is no template (which is fine: ours is used).

    Raises:
        CheckpointRefused: the template renders another prompt, so the checkpoint was trained on another one.
    """
    if not tokenizer.chat_template:
        return "no template"
    query, document = PROBE
    expected, rendered = prompt(query, document), ""
    # sentence-transformers' own roles first; a generic ChatML template needs the prompt's real ones.
    for first, second in (("query", "document"), ("system", "user")):
        messages = [{"role": first, "content": query}, {"role": second, "content": document}]
        try:
            rendered = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:
            rendered = f"{type(error).__name__}: {error}"
        if rendered == expected:
            return f"roles {first}/{second}"
    msg = (
        f"the chat template renders another prompt.\nfound:    {rendered!r}\nexpected: {expected!r}\n"
        "A checkpoint trained on another prompt would score wrongly here. If it was trained on this one, delete its template"
    )
    raise CheckpointRefused(msg)


def context(model: str, config: transformers.PretrainedConfig, tokenizer: TokenizersBackend) -> int:
    """Tokens of the longest prompt: as published, else the smaller of the model's positions and the tokenizer's limit."""
    checkpoint = checkpoints.known(model)
    if checkpoint is not None:
        return checkpoint.context
    # Tokenizers without a limit say so with a number of 30 digits.
    return int(min(config.max_position_embeddings, tokenizer.model_max_length))


def _download(repository: str, revision: str | None, source: Source) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = huggingface_hub.snapshot_download(
            repository,
            revision=revision,
            cache_dir=source.cache_folder,
            local_files_only=source.local_files_only,
            token=source.token,
            allow_patterns=list(DOWNLOADED),
        )
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise ModelUnreachable(_unreachable(repository, revision, source, error)) from error
    return Path(folder)


def _unreachable(repository: str, revision: str | None, source: Source, error: Exception) -> str:
    import huggingface_hub
    from huggingface_hub import constants

    cache = Path(source.cache_folder or constants.HF_HUB_CACHE)
    try:
        cached = sorted(r.repo_id for r in huggingface_hub.scan_cache_dir(cache).repos if r.repo_type == "model")
    except (OSError, huggingface_hub.errors.CacheNotFound):
        cached = []
    offline = constants.HF_HUB_OFFLINE or source.local_files_only
    cause = " ".join(str(error).split())[:300]
    return (
        f"{repository}{f' at revision {revision}' if revision else ''} could not be had from {constants.ENDPOINT}"
        f"{' (offline mode is on: HF_HUB_OFFLINE or local_files_only)' if offline else ''}.\n"
        f"cause: {type(error).__name__}: {cause}\n"
        f"cached models in {cache}: {', '.join(cached) or 'none'}\n"
        "What to do: pass the folder of a downloaded checkpoint; or set HF_HOME to the cache that holds it, HF_ENDPOINT to a "
        'mirror, token= for a private one; or try the library without any download: Reranker("zelo-mini")'
    )


def _base(adapter: Recognised, source: Source) -> tuple[Recognised, Path]:
    """The base an adapter lies over, and the folder of the tokenizer: its own if it brings one, else its base's."""
    name = source.base or adapter.config.get("base_model_name_or_path")
    if not name:
        msg = f"the adapter {adapter.folder} names no base model; expected one. Pass base= with its folder or id"
        raise CheckpointRefused(msg)
    # An adapter records its base as it was called in training; beside the adapter is where a moved pair still meets.
    beside = adapter.folder / name
    try:
        folder = beside if not os.path.isabs(name) and beside.is_dir() else locate(name, source)
        base = recognise(folder)
    except ModelUnreachable as error:
        msg = f"the base {name!r} of the adapter {adapter.folder} was not found. Pass base= with its folder or id\n{error}"
        raise ModelUnreachable(msg) from error
    if base.layout not in (Layout.CAUSAL_LM, Layout.SENTENCE_TRANSFORMERS):
        msg = f"the base {name!r} of {adapter.folder} is a {base.layout}; expected a causal LM. Pass base= with another folder"
        raise CheckpointRefused(msg)
    own = (adapter.folder / "tokenizer.json").is_file()
    return base, adapter.folder if own else base.weights


def _weights(recognised: Recognised, settings: dict[str, Any]) -> transformers.PreTrainedModel:
    files = weight_files(recognised.weights)
    auto = (
        transformers.AutoModelForSequenceClassification
        if recognised.layout is Layout.SEQUENCE_CLASSIFICATION
        else transformers.AutoModelForCausalLM
    )
    try:
        with _bar_only_for(files):
            model, report = auto.from_pretrained(  # type: ignore[misc]
                recognised.weights,
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **settings,
            )
    except ImportError as error:
        msg = f"the attention {settings['attn_implementation']!r} needs a package that is not installed ({error})"
        raise MissingPackage(msg) from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # Foreign files can be wrong in any way, and transformers answers with any exception.
        msg = (
            f"the checkpoint in {recognised.weights} cannot be read ({type(error).__name__}: {error}); expected config.json "
            "and whole safetensors as they were published. Download them again"
        )
        raise CheckpointRefused(msg) from error
    missing = sorted(report["missing_keys"])
    if missing:
        msg = (
            f"{recognised.weights} lacks {len(missing)} tensors ({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}), "
            "which would be newly initialised with random numbers; expected all of them. A zerank checkpoint stores its "
            "head or ties it to the embeddings: download it again, or export it as a causal LM"
        )
        raise CheckpointRefused(msg)
    return model


@contextmanager
def _bar_only_for(files: list[Path]) -> Iterator[None]:
    """Transformers' loading bar is welcome for gigabytes and noise for a model that loads in a blink."""
    if not is_progress_bar_enabled() or sum(file.stat().st_size for file in files) > 2**28:
        yield
        return
    disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        enable_progress_bar()  # type: ignore[no-untyped-call]


def _yes_row(recognised: Recognised, yes: int, *, tied: bool) -> tuple[torch.Tensor, float]:
    """The "Yes" row as it is stored, in float32 whatever the model computes in, and the scale it carries.

    A sequence classifier's one row must be the embedding of "Yes", or a fifth of it, unless its config records the scale.
    """
    embedding = _stored_row(recognised.weights, "embed_tokens.weight", yes)
    if recognised.layout is not Layout.SEQUENCE_CLASSIFICATION:
        return embedding if tied else _stored_row(recognised.weights, "lm_head.weight", yes), 1.0
    score = _stored_row(recognised.weights, "score.weight", 0)
    recorded = recognised.config.get("zerank_score_scale")
    if recorded is not None:
        return score, float(recorded)
    for scale in (1.0, 0.2):
        # Wide enough for a row rounded to bfloat16 (8 bits of mantissa), far from the other scale.
        if torch.allclose(score, embedding * scale, rtol=2**-7, atol=1e-6):
            return score, scale
    msg = (
        f'the score row of {recognised.weights} is neither the embedding of "Yes" nor a fifth of it, so its scale is unknown; '
        'expected one of them, or "zerank_score_scale" in config.json (1 if the row gives the logit, 0.2 if it gives logit/5)'
    )
    raise CheckpointRefused(msg)


def _stored_row(folder: Path, name: str, row: int) -> torch.Tensor:
    """One row of a stored tensor in float32; the name may carry any prefix."""
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - a handle of safetensors, not a dictionary
                if key == name or key.endswith("." + name):
                    return tensors.get_slice(key)[row : row + 1][0].float()
    msg = f"{folder} stores no tensor {name}; expected one. Download the checkpoint again"
    raise CheckpointRefused(msg)


def _merged(model: transformers.PreTrainedModel, adapter: Path) -> transformers.PreTrainedModel:
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        msg = 'a LoRA adapter needs peft, which is not installed: pip install "zerank-integrations[train]"'
        raise MissingPackage(msg) from error
    try:
        adapted = PeftModel(model, PeftConfig.from_pretrained(str(adapter)))
        report = adapted.load_adapter(str(adapter), "default", is_trainable=False)
    except (SafetensorError, RuntimeError, TypeError, ValueError) as error:
        msg = f"the adapter {adapter} does not load over its base ({error}); expected peft's files, made over this base"
        raise CheckpointRefused(msg) from error
    unmatched = sorted({*report.unexpected_keys, *(key for key in report.missing_keys if "lora_" in key)})
    if unmatched:
        msg = (
            f"{len(unmatched)} tensors of the adapter {adapter} do not meet its base ({unmatched[0]}, …); expected all to. "
            "It was trained over another base: pass base= with the right one"
        )
        raise CheckpointRefused(msg)
    # Merged, an adapter costs nothing per token; a NaN in it is an error rather than a ranking.
    return adapted.merge_and_unload(safe_merge=True)
