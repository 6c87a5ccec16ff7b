"""A lexical ranking circuit, written by program into the weights of a Qwen3.

The model reads ``system {query} user {document} assistant`` (zerank's prompt) and its causal attention does what BM25 does:

* layer 0: which turn a token is in (the *turn head*) and what stood before it (the *previous-token head*);
* layer 1: every document token looks for its own word in the query (*match head*), for its earlier occurrences in the
  document (*repeat head*), for a query token with the same predecessor (*phrase head*) and for one of related meaning
  (*related head*);
* layer 2: the last token adds up the rarity of what was found (*sum heads*), a repetition adding less each time, and the
  rarity of the whole query;
* the "Yes" row reads the sums.

Everything else starts at or near zero and is free to learn.

Three facts about Qwen3 shape the constants:

* *RMSNorm* rescales what each layer reads. Every embedding row has root mean square 1, so the first norm changes nothing, and
  what the heads add is small beside it.
* *QK-norm* rescales each head's query and key to a fixed length, so an attention score is ``sharpness · cosine``. A constant
  part on a *gate* dimension keeps lengths steady and decides which kind of token may be found at all; a part of the key
  on the *ballast* dimension, which no query has, lowers all its cosines.
* *Rotary positions* turn pairs of dimensions by angles that grow with position. With a very large base most pairs hardly
  turn at all over 4,096 tokens and compare content; the first few turn fast and tell the distance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from lexicon import Lexicon
from transformers import Qwen3Config, Qwen3ForCausalLM

HIDDEN, LAYERS, HEADS, HEAD_DIM, MLP = 256, 4, 4, 128, 256
ROPE_THETA = 1e32
MAX_LENGTH = 4096

# Where things lie in the residual stream.
CODE = slice(0, 108)  # a random direction per stem: equal for equal words, near orthogonal otherwise
MEANING = slice(108, 172)  # latent semantic vector
PREVIOUS = slice(172, 220)  # written by layer 0: the code of the token before, projected
CONSTANT, RARITY, WORD, START, END = 220, 221, 222, 223, 224
IN_DOCUMENT, ROLE = 225, 226  # written by layer 0
MATCHED, MATCH, NOVELTY, PHRASED, PHRASE, RELATED, RELATION = 227, 228, 229, 230, 231, 232, 233  # by layer 1
SUM_MATCHED, SUM_PHRASED, SUM_RELATED, SUM_QUERY = 234, 235, 236, 237  # by layer 2
FILLER = 255  # takes up what is missing to root mean square 1

# Lengths of the parts of an embedding row; 256 is the squared length of the whole row.
CODE_LENGTH, MEANING_LENGTH = 10.0, 6.0
CONSTANT_VALUE, RARITY_VALUE, WORD_VALUE, CONTROL_VALUE = 3.0, 5.0, 2.0, 10.0
IN_DOCUMENT_VALUE = 4.0

# Head dimensions. Pair j is (j, j + 64); pairs below FAST turn with position.
FAST = 8
GATE, BALLAST = 63, 127
QUERY_BALLAST = 126
SLOW = [*range(FAST, 62), *range(FAST + 64, 126)]  # 108 dimensions that compare content

# What the attention score of a perfect cosine is, per layer.
SHARPNESS = (80.0, 60.0, 24.0, 24.0)


@dataclass(frozen=True)
class Strengths:
    """The circuit's few tunable numbers, all in plain terms.

    Log-weights are those of the last token's sums against a sink of log-weight 0. ``repetition`` is how fast a repeated
    word's weight falls. The head reads ``matched · Σ + phrased · Σ + …``.
    """

    found: float = -3.0
    unfound: float = -8.5
    repetition: float = 6.0
    matched: float = 18.0
    phrased: float = 17.0
    related: float = 2.0
    query: float = -2.0
    offset: float = -10.0


def configuration(vocabulary: int, end_id: int) -> Qwen3Config:
    """The shape of the model, as config.json will hold it."""
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
        intermediate_size=MLP,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        eos_token_id=end_id,
        pad_token_id=end_id,
        bos_token_id=None,
    )


@torch.no_grad()
def write_circuit(
    lexicon: Lexicon, start_id: int, end_id: int, yes_id: int, strengths: Strengths | None = None, seed: int = 0
) -> Qwen3ForCausalLM:
    """A float32 Qwen3 whose weights are the circuit; what the circuit does not use is small and random."""
    strengths = strengths or Strengths()
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(configuration(len(lexicon.stem), end_id)).eval()
    for layer, sharpness in zip(model.model.layers, SHARPNESS, strict=True):
        attention = layer.self_attn
        # |query| = |key| = weight · sqrt(HEAD_DIM), and the score is their product over sqrt(HEAD_DIM).
        attention.q_norm.weight.fill_(math.sqrt(sharpness / math.sqrt(HEAD_DIM)))
        attention.k_norm.weight.fill_(math.sqrt(sharpness / math.sqrt(HEAD_DIM)))
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight.normal_(0, 0.03)
        for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
            projection.weight.normal_(0, 0.03)
        # Free heads and the MLPs write nothing until they have learnt to.
        attention.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    write_embeddings(model, lexicon, start_id, end_id, yes_id, seed)
    write_turn_head(Head(model, 0, 0))
    write_previous_token_head(Head(model, 0, 1), seed)
    write_match_head(Head(model, 1, 0))
    write_repeat_head(Head(model, 1, 1))
    write_phrase_head(Head(model, 1, 2), seed)
    write_related_head(Head(model, 1, 3))
    for number, (found, value, total) in enumerate(
        ((MATCH, MATCHED, SUM_MATCHED), (PHRASE, PHRASED, SUM_PHRASED), (RELATION, RELATED, SUM_RELATED))
    ):
        write_sum_head(Head(model, 2, number), found, value, total, strengths)
    write_query_sum_head(Head(model, 2, 3), strengths)
    write_relevance_head(model, strengths)
    return model


class Head:
    """One attention head's slices of its layer's projections, cleared."""

    def __init__(self, model: Qwen3ForCausalLM, layer: int, number: int) -> None:
        attention = model.model.layers[layer].self_attn
        rows = slice(number * HEAD_DIM, (number + 1) * HEAD_DIM)
        self.q = attention.q_proj.weight[rows]
        self.k = attention.k_proj.weight[rows]
        self.v = attention.v_proj.weight[rows]
        self.o = attention.o_proj.weight[:, rows]
        self.sharpness = SHARPNESS[layer]
        for part in (self.q, self.k, self.v, self.o):
            part.zero_()

    def copy(self, slot: int, source: int, target: int, gain: float = 1.0) -> None:
        """Let the head carry dimension ``source`` of what it attends to into dimension ``target``."""
        self.v[slot, source] = 1.0
        self.o[target, slot] = gain


def write_embeddings(model: Qwen3ForCausalLM, lexicon: Lexicon, start_id: int, end_id: int, yes_id: int, seed: int) -> None:
    """Code, meaning, rarity and flags of every token; every row has root mean square 1."""
    random = np.random.default_rng(seed)
    codes = random.normal(size=(lexicon.stem.max() + 1, CODE.stop - CODE.start))
    codes *= CODE_LENGTH / np.linalg.norm(codes, axis=1, keepdims=True)
    rows = np.zeros((len(lexicon.stem), HIDDEN))
    rows[:, CODE] = codes[lexicon.stem]
    rows[:, MEANING] = MEANING_LENGTH * lexicon.meaning
    rows[:, RARITY] = RARITY_VALUE * lexicon.rarity
    rows[:, WORD] = WORD_VALUE * (lexicon.rarity > 0)
    for control, flag in ((start_id, START), (end_id, END)):
        rows[control] = 0
        rows[control, flag] = CONTROL_VALUE
    rows[:, CONSTANT] = CONSTANT_VALUE
    # The row of "Yes" is an ordinary word where it is read, and the output head where it is the answer: it alone has
    # parts in the sums' dimensions, which no circuit reads from an input token.
    rows[yes_id, SUM_MATCHED : SUM_QUERY + 1] = 1.0
    rows[:, FILLER] = np.sqrt(HIDDEN - (rows**2).sum(1))
    model.model.embed_tokens.weight[:] = torch.tensor(rows, dtype=torch.float32)


def write_turn_head(head: Head) -> None:
    """IN_DOCUMENT: whether an <|im_end|> stands before. Tokens of the query can only look at the first <|im_start|>."""
    head.q[GATE, CONSTANT] = 1 / CONSTANT_VALUE
    # Cosines of the three kinds of key: <|im_end|> 1, <|im_start|> .7, text -1.
    head.k[GATE, CONSTANT] = -1 / CONSTANT_VALUE
    head.k[GATE, END] = 2 / CONTROL_VALUE
    head.k[GATE, START] = 1.7 / CONTROL_VALUE
    head.k[BALLAST, START] = 0.7 / CONTROL_VALUE
    head.copy(0, END, IN_DOCUMENT, IN_DOCUMENT_VALUE / CONTROL_VALUE)


def write_previous_token_head(head: Head, seed: int) -> None:
    """PREVIOUS: the code of the token before. ROLE: it was <|im_start|>, so this token names a turn."""
    # Fast pairs, the query turned back by one position: the cosine is largest at distance 1.
    for pair, share in enumerate((0.5, 0.25, 0.12, 0.08, 0.05)):
        angle = ROPE_THETA ** (-2 * pair / HEAD_DIM)
        amplitude = math.sqrt(share) / CONSTANT_VALUE
        head.q[pair, CONSTANT] = amplitude * math.cos(angle)
        head.q[pair + HEAD_DIM // 2, CONSTANT] = -amplitude * math.sin(angle)
        head.k[pair, CONSTANT] = amplitude
    codes = CODE.stop - CODE.start
    head.v[:codes, CODE] = torch.eye(codes)
    head.o[PREVIOUS, :codes] = _projection(PREVIOUS.stop - PREVIOUS.start, codes, seed + 1)
    head.copy(codes, START, ROLE, 1 / CONTROL_VALUE)


def write_match_head(head: Head) -> None:
    """MATCHED: the rarity of the query's token with my code, else 0; MATCH: there is one.

    Cosines: same code 1; other code ½; the first <|im_start|>, which has no code, .71: it is found when nothing matches.
    """
    head.q[SLOW, CODE] = torch.eye(len(SLOW))
    head.k[SLOW, CODE] = torch.eye(len(SLOW))
    _open_to_query(head, CODE_LENGTH)
    head.copy(0, RARITY, MATCHED, 1 / RARITY_VALUE)
    head.copy(1, WORD, MATCH, 1 / WORD_VALUE)


def write_repeat_head(head: Head) -> None:
    """NOVELTY: 1/(1+n) at the n-th occurrence of a word in the document.

    A document token divides its attention evenly between its own word's occurrences so far, itself included, and the
    <|im_end|> before the document, whose share it keeps.
    """
    head.q[SLOW, CODE] = torch.eye(len(SLOW))
    head.k[SLOW, CODE] = torch.eye(len(SLOW))
    head.q[GATE, CONSTANT] = CODE_LENGTH / CONSTANT_VALUE
    head.k[GATE, CONSTANT] = -CODE_LENGTH / CONSTANT_VALUE
    head.k[GATE, IN_DOCUMENT] = 2 * CODE_LENGTH / IN_DOCUMENT_VALUE
    # A key along the gate alone has cosine 1/sqrt(2) with every query. This ballast lowers a word's own cosine to that.
    head.k[BALLAST, CONSTANT] = math.sqrt(2) * CODE_LENGTH / CONSTANT_VALUE
    head.k[BALLAST, END] = -math.sqrt(2) * CODE_LENGTH / CONTROL_VALUE
    # Other turn markers are no sinks: there should be exactly one.
    head.k[GATE, START] = -4 * CODE_LENGTH / CONTROL_VALUE
    head.copy(0, END, NOVELTY, 1 / CONTROL_VALUE)


def write_phrase_head(head: Head, seed: int) -> None:
    """PHRASED: the rarity of a query token that has my code and my predecessor's; PHRASE: there is one."""
    half, previous = len(SLOW) - (PREVIOUS.stop - PREVIOUS.start), PREVIOUS.stop - PREVIOUS.start
    side = CODE_LENGTH / math.sqrt(2)
    code = CODE.stop - CODE.start
    # Both halves shortened by their projections; scaled back to equal lengths.
    own = _projection(half, code, seed + 2) * (side / (CODE_LENGTH * math.sqrt(half / code)))
    before = torch.eye(previous) * (side / (CODE_LENGTH * math.sqrt(previous / code)))
    for part in (head.q, head.k):
        part[SLOW[:half], CODE] = own
        part[SLOW[half:], PREVIOUS] = before
    _open_to_query(head, CODE_LENGTH)
    # One of the two alone has ¾ of the cosine, above the sink's .71; this ballast of text tokens puts it below.
    head.k[BALLAST, CONSTANT] = 0.62 * math.sqrt(2) * CODE_LENGTH / CONSTANT_VALUE
    head.k[BALLAST, START] = -0.62 * math.sqrt(2) * CODE_LENGTH / CONTROL_VALUE
    head.k[BALLAST, END] = -0.62 * math.sqrt(2) * CODE_LENGTH / CONTROL_VALUE
    head.copy(0, RARITY, PHRASED, 1 / RARITY_VALUE)
    head.copy(1, WORD, PHRASE, 1 / WORD_VALUE)


def write_related_head(head: Head) -> None:
    """RELATED: the rarity of the query token nearest to me in meaning, if it is near (cosine above about .6)."""
    meanings = MEANING.stop - MEANING.start
    dims = SLOW[:meanings]
    scale = CODE_LENGTH / MEANING_LENGTH
    for part in (head.q, head.k):
        part[dims, MEANING] = scale * torch.eye(meanings)
    _open_to_query(head, CODE_LENGTH)
    ballast = 0.55
    head.k[BALLAST, CONSTANT] = ballast * math.sqrt(2) * CODE_LENGTH / CONSTANT_VALUE
    head.k[BALLAST, START] = -ballast * math.sqrt(2) * CODE_LENGTH / CONTROL_VALUE
    head.k[BALLAST, END] = -ballast * math.sqrt(2) * CODE_LENGTH / CONTROL_VALUE
    head.copy(0, RARITY, RELATED, 1 / RARITY_VALUE)
    head.copy(1, WORD, RELATION, 1 / WORD_VALUE)


def _open_to_query(head: Head, length: float) -> None:
    """Gate: keys of the query's words only, never of the document or of a turn's name."""
    head.q[GATE, CONSTANT] = length / CONSTANT_VALUE
    head.k[GATE, CONSTANT] = length / CONSTANT_VALUE
    head.k[GATE, IN_DOCUMENT] = -2 * length / IN_DOCUMENT_VALUE
    # Role words ("system", "user") are read as no word: not found, and finding nothing.
    head.k[GATE, ROLE] = -4 * length
    head.q[GATE, ROLE] = 4 * length
    # The first token has nothing before it and so looks like a role to itself: undone, it is the sink.
    head.k[GATE, START] = 4 * length / CONTROL_VALUE


def write_sum_head(head: Head, found: int, value: int, total: int, strengths: Strengths) -> None:
    """``total``: the sum of ``value`` over document tokens, each weighted by whether it was ``found`` and how novel it is.

    The two <|im_start|> from the document's turn on are the sink: with their weight 1 each and small weights w of the tokens,
    attention gives Σ w·value / (2 + Σ w), a sum that saturates gently; tokens that found nothing have a tiny weight
    and so shorten the sums of long documents.
    """
    per = 1 / head.sharpness
    head.q[GATE, CONSTANT] = 1 / CONSTANT_VALUE
    # Document text: unfound + (found - unfound) · found? + repetition · (novelty - ½); query text far below.
    constant = -16.0
    head.k[GATE, CONSTANT] = per * constant / CONSTANT_VALUE
    head.k[GATE, IN_DOCUMENT] = per * (strengths.unfound - strengths.repetition / 2 - constant) / IN_DOCUMENT_VALUE
    head.k[GATE, found] = per * (strengths.found - strengths.unfound)
    head.k[GATE, NOVELTY] = per * strengths.repetition
    # The sinks, whose novelty is .9, to 0; <|im_end|> out of the way.
    head.k[GATE, START] = -per * (strengths.unfound + 0.4 * strengths.repetition) / CONTROL_VALUE
    head.k[GATE, END] = per * constant / CONTROL_VALUE
    head.k[BALLAST, CONSTANT] = 1 / CONSTANT_VALUE
    head.copy(0, value, total, 2 * math.exp(-strengths.found))


def write_query_sum_head(head: Head, strengths: Strengths) -> None:
    """SUM_QUERY: the sum of rarity over the query's words, the measure of how much could have matched."""
    per = 1 / head.sharpness
    head.q[GATE, CONSTANT] = 1 / CONSTANT_VALUE
    head.k[GATE, CONSTANT] = per * strengths.found / CONSTANT_VALUE
    head.k[GATE, IN_DOCUMENT] = per * (-16.0 - strengths.found) / IN_DOCUMENT_VALUE
    head.k[GATE, ROLE] = -per * 16.0
    # 0 for the two <|im_start|> from the document's turn on, the sink.
    head.k[GATE, START] = per * 16.0 / CONTROL_VALUE
    head.k[BALLAST, CONSTANT] = 1 / CONSTANT_VALUE
    head.copy(0, RARITY, SUM_QUERY, 2 * math.exp(-strengths.found) / RARITY_VALUE)


def write_relevance_head(model: Qwen3ForCausalLM, strengths: Strengths) -> None:
    """The last norm lets only the sums and the constant through to the dot product with the "Yes" row."""
    weight = model.model.norm.weight
    weight.zero_()
    weight[SUM_MATCHED] = strengths.matched
    weight[SUM_PHRASED] = strengths.phrased
    weight[SUM_RELATED] = strengths.related
    weight[SUM_QUERY] = strengths.query
    weight[CONSTANT] = strengths.offset / CONSTANT_VALUE**2


def _projection(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Random orthonormal rows: keeps angles between codes nearly as they were."""
    random = np.random.default_rng(seed)
    orthogonal, _ = np.linalg.qr(random.normal(size=(columns, rows)))
    return torch.tensor(orthogonal.T, dtype=torch.float32)
