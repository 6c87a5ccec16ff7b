"""Everything that needs a GPU, in one call: ceilings, attention's alignment, every contender end to end, stages, memory.

    python -m benchmarks.gpu --shape zerank-1-small     # some minutes; writes benchmarks/results/gpu-….json
    python -m benchmarks.gpu --shape zerank-2           # the 4B
    python -m benchmarks.gpu --shape tiny --device cpu  # does it run at all

The weights are random and made on the device: nothing is downloaded, and no file but the tokenizer's is written. What cannot be
measured says why, and the rest goes on; the JSON is written after every part.
"""

from __future__ import annotations

import copy
import inspect
import os
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import typer
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel

from benchmarks import payload
from benchmarks.contenders import counting
from benchmarks.measure import percentile, write
from benchmarks.standin import CONTEXT, SHAPES, TINY, Shape, causal_lm, checkpoint
from zerank_integrations import Reranker

Score = Callable[[str, Sequence[str]], object]
Figures = dict[str, Any]

# Options of Reranker by which an engine may offer each way; the first it has is taken, and a way it has not is skipped.
WAYS: dict[str, tuple[tuple[str, object], ...]] = {
    "ours": (),
    "ours, compiled": (("compile", True), ("compiled", True)),
    "ours, graphs": (("graphs", True), ("cuda_graphs", True)),
    "ours, fp8": (("fp8", True), ("quantization", "fp8")),
}
BATCHES = (32, 64, 128)


class Skipped(Exception):
    """A part that cannot be measured here; the text says why."""


@dataclass(frozen=True, slots=True)
class Payload:
    """What one request holds."""

    kilobytes: int
    documents: int
    query_tokens: int

    @property
    def name(self) -> str:
        """As the table names it."""
        return f"{self.documents} documents, {self.kilobytes} kB, query of {self.query_tokens}"

    def texts(self, run: int, count: Callable[[str], int]) -> tuple[str, list[str]]:
        """Query and documents of a run; each run has its own."""
        query = payload.query(self.query_tokens, run, count)
        return query, payload.documents(self.kilobytes * 1000, run, self.documents)


PAYLOADS = (Payload(75, 100, 50), Payload(75, 100, 300), Payload(4, 5, 50))


def main(
    *,
    shape: Annotated[str, typer.Option(help="zerank-1-small, zerank-2, stand-in or tiny.")] = "zerank-1-small",
    device: Annotated[str, typer.Option(help="cuda, or cpu for a trial.")] = "cuda",
    runs: Annotated[int, typer.Option(min=1, help="Interleaved runs of each contender and payload.")] = 30,
    output: Annotated[Path | None, typer.Option(help="The JSON file; by default a new one in benchmarks/results/.")] = None,
) -> None:
    """Measure all of it and write JSON."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise typer.BadParameter(
            "torch sees no GPU; expected one. For a trial: --shape tiny --device cpu", param_hint="--device"
        )
    chosen, trial = SHAPES[shape], not device.startswith("cuda")
    payloads = (Payload(2, 6, 20),) if trial else PAYLOADS
    name = torch.cuda.get_device_name() if not trial else "CPU (a trial)"
    figures: Figures = {"device": name, "shape": shape, "sizes": asdict(chosen), "runs": runs, "ceilings": {}, "end_to_end": {}}
    if output is None and not trial:
        output = Path(__file__).with_name("results") / f"gpu-{time.strftime('%Y%m%d-%H%M', time.gmtime())}.json"

    def part(title: str, work: Callable[[], Figures]) -> Figures:
        begun = time.perf_counter()
        try:
            found = work()
        except Skipped as reason:
            found = {"skipped": str(reason)}
        except Exception as error:
            # An expensive call: what one part cannot do must not cost the others.
            traceback.print_exc()
            found = {"skipped": f"{type(error).__name__}: {error}"[:500]}
        typer.echo(f"{title}: {found} ({time.perf_counter() - begun:.1f} s)")
        return found

    def keep() -> None:
        write("gpu", figures, output, quick=trial)

    size = 8192 if not trial else 128
    for ceiling, work in (("matmul bf16", matmul), ("matmul fp8", matmul_fp8), ("copy", copy_rate)):
        figures["ceilings"][ceiling] = part(ceiling, partial(work, size, device))
        keep()
    figures["varlen"] = part("varlen's causal alignment", partial(varlen_alignment, chosen, device))
    keep()

    model = causal_lm(chosen, device)
    folder = checkpoint(TINY) if chosen is TINY else checkpoint(SHAPES["stand-in"])
    tokens = AutoTokenizer.from_pretrained(folder)

    def count(text: str) -> int:
        return len(tokens.encode(text, add_special_tokens=False))

    contenders: dict[str, Score] = {}
    missing: dict[str, Figures] = {}
    rerankers: list[Reranker] = []
    with loaded_from(model, folder):
        for way, options in WAYS.items():
            try:
                reranker = ours(folder, device, options, needs_option=way != "ours")
            except Skipped as reason:
                missing[way] = {"skipped": str(reason)}
            except Exception as error:
                traceback.print_exc()
                missing[way] = {"skipped": f"{type(error).__name__}: {error}"[:500]}
            else:
                rerankers.append(reranker)
                contenders[way] = reranker.rank
        try:
            encoder = sentence_transformers(model, folder, device)
        except Exception as error:
            traceback.print_exc()
            missing["ST"] = {"skipped": f"{type(error).__name__}: {error}"[:500]}
        else:
            contenders |= {f"ST batch {batch}": _predict(encoder, batch) for batch in BATCHES}
        matmul_rate = figures["ceilings"]["matmul bf16"].get("value")
        for load in payloads:
            found = part(load.name, partial(end_to_end, contenders, load, runs, count, device))
            for one in found.values():
                if isinstance(one, dict) and matmul_rate and "p50_s" in one:
                    floor = floor_seconds(chosen, load, count, matmul_rate)
                    one |= {"floor_s": floor, "floor_fraction": floor / one["p50_s"]}
            figures["end_to_end"][load.name] = found | missing
            keep()
        if "ours" in contenders:
            figures["stages"] = part("stages", partial(stages, rerankers[0], payloads[0], max(3, runs // 3), count, device))
            keep()
        for reranker in rerankers:
            reranker.close()
    typer.echo(f"written: {output}" if output else "a trial: not written (use --output FILE)")


# Ceilings


def matmul(size: int, device: str) -> Figures:
    """The rate of a large bfloat16 matrix product."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = _best(lambda: a @ b, device)
    return {"value": 2 * size**3 / seconds / 1e12, "unit": "TFLOP/s"}


def matmul_fp8(size: int, device: str) -> Figures:
    """The rate of a large fp8 matrix product, accumulated in float32."""
    if not device.startswith("cuda") or torch.cuda.get_device_capability() < (8, 9):
        msg = "fp8 products need a GPU of compute capability 8.9 or more"
        raise Skipped(msg)
    a = torch.randn(size, size, device=device).to(torch.float8_e4m3fn)
    b = torch.randn(size, size, device=device).to(torch.float8_e4m3fn).t()
    one = torch.ones((), device=device)
    seconds = _best(
        lambda: torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True), device
    )
    return {"value": 2 * size**3 / seconds / 1e12, "unit": "TFLOP/s"}


def copy_rate(size: int, device: str) -> Figures:
    """The rate at which memory is read and written."""
    source = torch.empty(4 * size * size, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    seconds = _best(lambda: target.copy_(source), device)
    return {"value": 2 * source.numel() * source.element_size() / seconds / 1e9, "unit": "GB/s"}


def _best(work: Callable[[], object], device: str) -> float:
    """Seconds of one call: the least mean of five series, after a warm-up."""
    times = []
    for _ in range(6):
        _wait(device)
        begun = time.perf_counter()
        for _ in range(10):
            work()
        _wait(device)
        times.append((time.perf_counter() - begun) / 10)
    return min(times[1:])


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


# Attention of fewer queries than keys


def dense_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention in float32 with queries aligned with the LAST keys: query i of n sees keys up to i + m - n of m.

    Shapes: query (n, heads, width), key and value (m, kv heads, width); returns (n, heads, width).
    """
    n, m, group = len(query), len(key), query.shape[1] // key.shape[1]
    key, value = (t.float().repeat_interleave(group, dim=1) for t in (key, value))
    scores = torch.einsum("nhd,mhd->hnm", query.float(), key) * query.shape[-1] ** -0.5
    seen = torch.arange(m, device=query.device)[None] <= torch.arange(n, device=query.device)[:, None] + m - n
    return torch.einsum("hnm,mhd->nhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)


def varlen_alignment(shape: Shape, device: str) -> Figures:
    """Whether `varlen_attn` aligns its causal mask at the end, as a document after a shared prefix needs it.

    Returns:
        The largest differences from the dense reference with both alignments, and which of its options there are.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        msg = f"this torch has no varlen_attn ({error})"
        raise Skipped(msg) from error
    if not device.startswith("cuda"):
        msg = "varlen_attn has no kernel for the CPU"
        raise Skipped(msg)
    parameters = inspect.signature(varlen_attn).parameters
    lengths = ((5, 37), (64, 64), (1, 200), (130, 300))  # queries and keys of each document
    generator = torch.Generator(device).manual_seed(0)

    def some(tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(tokens, heads, shape.head_dim, device=device, generator=generator).to(torch.bfloat16)

    query = some(sum(n for n, _ in lengths), shape.heads)
    key, value = (some(sum(m for _, m in lengths), shape.kv_heads) for _ in range(2))
    starts = [torch.tensor([0, *column], device=device).cumsum(0).to(torch.int32) for column in zip(*lengths, strict=True)]
    options: Figures = {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    keys, values = key, value
    if "enable_gqa" in parameters:
        options["enable_gqa"] = True
    else:
        keys, values = (t.repeat_interleave(shape.heads // shape.kv_heads, dim=1) for t in (key, value))
    longest = [max(column) for column in zip(*lengths, strict=True)]
    answer: Any = varlen_attn(query, keys, values, starts[0], starts[1], longest[0], longest[1], **options)
    found = answer.float()
    at_end, at_start = [], []
    q = k = 0
    for n, m in lengths:
        one = found[q : q + n]
        at_end.append((one - dense_attention(query[q : q + n], key[k : k + m], value[k : k + m])).abs().max().item())
        at_start.append((one - dense_attention(query[q : q + n], key[k : k + n], value[k : k + n])).abs().max().item())
        q, k = q + n, k + m
    return {
        "aligned": "end" if max(at_end) < 0.03 else "start" if max(at_start) < 0.03 else "neither",
        "max_difference_end": max(at_end),
        "max_difference_start": max(at_start),
        "options": [name for name in parameters if name not in ("query", "key", "value")],
    }


# Contenders


@contextmanager
def loaded_from(model: Any, folder: Path) -> Iterator[None]:  # noqa: ANN401 - transformers types little of it
    """Inside, whatever a Reranker loads is this model, already on the device, with the folder's tokenizer."""
    from zerank_integrations import loading

    load = loading.load

    def in_memory(source: Any, place: Path) -> Any:  # noqa: ANN401 - as `load` has it
        # The folder's own small weights are loaded for all that lies around them, then the decoder is exchanged.
        loaded = load(source, place)
        yes = model.get_output_embeddings().weight[loaded.encoder.yes].detach().float()
        # Copied, because an engine may rebuild what it is given, and others compute with the model too.
        decoder = copy.deepcopy(model.get_decoder()).requires_grad_(requires_grad=False)
        changed = {"decoder": decoder, "yes": yes, "context": CONTEXT}
        return type(loaded)(**{name: changed.get(name, getattr(loaded, name)) for name in loaded.__dataclass_fields__})

    with mock.patch.object(loading, "load", in_memory):
        yield


def ours(folder: Path, device: str, options: Sequence[tuple[str, object]], *, needs_option: bool) -> Reranker:
    """A warm Reranker, with the first of the options that this engine has."""
    known = inspect.signature(Reranker).parameters
    chosen = dict([option for option in options if option[0] in known][:1])
    if needs_option and not chosen:
        msg = f"this engine has none of the options {[name for name, _ in options]}"
        raise Skipped(msg)
    return Reranker(folder, device=device, dtype="bfloat16", **chosen).warm_up()  # type: ignore[arg-type]


def sentence_transformers(model: PreTrainedModel, folder: Path, device: str) -> Any:  # noqa: ANN401 - a CrossEncoder
    """A CrossEncoder around the model in memory."""
    from sentence_transformers import CrossEncoder

    encoder = CrossEncoder(str(folder), device=device, local_files_only=True, model_kwargs={"dtype": torch.bfloat16})
    transformer = encoder[0]
    attribute = next((name for name in ("model", "auto_model") if name in transformer._modules), None)
    if attribute is None:
        msg = f"this sentence-transformers keeps its model under none of the known names: {list(transformer._modules)}"
        raise Skipped(msg)
    setattr(transformer, attribute, model)
    return encoder


def _predict(encoder: Any, batch: int) -> Score:  # noqa: ANN401 - a CrossEncoder
    def predict(query: str, documents: Sequence[str]) -> object:
        pairs = [(query, document) for document in documents]
        return encoder.predict(pairs, batch_size=batch, show_progress_bar=False)

    return predict


# Runs


def end_to_end(
    contenders: dict[str, Score], load: Payload, runs: int, count: Callable[[str], int], device: str
) -> dict[str, Figures]:
    """From texts to scores: every contender in turn, `runs` times, each run with texts of its own."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    peaks: dict[str, int | None] = dict.fromkeys(contenders)
    failed: dict[str, Figures] = {}
    order = list(contenders)
    for run in tqdm(range(-2, runs), desc=load.name, disable=not sys.stderr.isatty()):
        query, documents = load.texts(run + 2, count)
        random.Random(run).shuffle(order)
        for name in [name for name in order if name not in failed]:
            held = _reset_peak(device)
            _wait(device)
            begun = time.perf_counter()
            try:
                contenders[name](query, documents)
            except Exception as error:
                failed[name] = {"skipped": f"{type(error).__name__}: {error}"[:500]}
                continue
            _wait(device)
            if run >= 0:  # the first two warm kernels and graphs up
                seconds[name].append(time.perf_counter() - begun)
            if held is not None:
                peaks[name] = max(peaks[name] or 0, torch.cuda.max_memory_allocated() - held)
    return {
        name: failed.get(name)
        or {
            "p50_s": percentile(seconds[name], 50),
            "p95_s": percentile(seconds[name], 95),
            "peak_bytes": peaks[name],
            "seconds": seconds[name],
        }
        for name in contenders
    }


def _reset_peak(device: str) -> int | None:
    if not device.startswith("cuda"):
        return None
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def floor_seconds(shape: Shape, load: Payload, count: Callable[[str], int], rate: float) -> float:
    """The least time the arithmetic takes at the measured rate of matrix products: each token once, the query's too."""
    query, documents = load.texts(0, count)
    prefix = count(query) + 8
    own = [count(document) + 5 for document in documents]
    attended = prefix * (prefix + 1) // 2 + sum(n * prefix + n * (n + 1) // 2 for n in own)
    return shape.flops(prefix + sum(own), attended) / (rate * 1e12)


def stages(reranker: Reranker, load: Payload, runs: int, count: Callable[[str], int], device: str) -> Figures:
    """Where our time goes: encoding texts, inside the decoder, and all the rest; medians in seconds, waiting for the device."""
    engine = reranker.engine()
    encoder, decoder = engine.encoder("text"), engine.loaded.decoder
    computed = counting(decoder)
    times: dict[str, list[float]] = {"whole": [], "encoding": [], "decoder": []}
    inside, begun = 0.0, 0.0

    def enter(*_: object) -> None:
        nonlocal begun
        _wait(device)
        begun = time.perf_counter()

    def leave(*_: object) -> None:
        nonlocal inside
        _wait(device)
        inside += time.perf_counter() - begun

    hooks = [decoder.register_forward_pre_hook(enter), decoder.register_forward_hook(leave)]
    try:
        for run in range(runs):
            query, documents = load.texts(1000 + run, count)
            start = time.perf_counter()
            encoder.encode(query, documents, engine.loaded.context)
            times["encoding"].append(time.perf_counter() - start)
            # Other texts, or the engine would find these ids in its cache.
            query, documents = load.texts(2000 + run, count)
            inside = 0.0
            start = time.perf_counter()
            reranker.rank(query, documents)
            times["whole"].append(time.perf_counter() - start)
            times["decoder"].append(inside)
    finally:
        for hook in hooks:
            hook.remove()
    found: Figures = {f"{name}_s": percentile(values, 50) for name, values in times.items()}
    found["rest_s"] = found["whole_s"] - found["encoding_s"] - found["decoder_s"]
    return found | {"tokens_computed": computed() // runs}


if __name__ == "__main__":
    typer.run(main)
