"""What may be packed: decided by a decoder's config, since no probe with short texts can see a window or a growing scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Scalings whose turn of a token depends on its position alone.
FIXED_ROPE = ("default", "linear", "llama3", "yarn")


def ropes(config: PretrainedConfig) -> list[str]:
    """The kinds of rotary scaling in a config: one, or one per kind of layer."""
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    each = [parameters] if "rope_type" in parameters else [p for p in parameters.values() if isinstance(p, dict)]
    return [str(p.get("rope_type", "default")) for p in each] or ["default"]


def depends_on_companions(config: PretrainedConfig) -> bool:
    """Whether the longest text of a batch changes how the others are read: dynamic and longrope scaling look at it."""
    return any(rope not in FIXED_ROPE for rope in ropes(config))


def why_not(config: PretrainedConfig, asked: str | None) -> str | None:
    """Why nothing of this decoder may be packed, as a clause; None if it may.

    Args:
        config: the decoder's.
        asked: the attention the caller asked for by name.
    """
    if asked not in (None, "sdpa"):
        return f"attn_implementation={asked!r} was asked for"
    if depends_on_companions(config):
        moving = ", ".join(rope for rope in ropes(config) if rope not in FIXED_ROPE)
        return f"its rotary scaling ({moving}) depends on the longest text of a step"
    return None


def window(config: PretrainedConfig) -> int | None:
    """The tokens a sliding window sees, None without one. It is harmless for prompts that fit into it."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    size: int | None = getattr(config, "sliding_window", None)
    return size
