"""ZerankRanker, beside the other integrations. It lives where Haystack's `Pipeline.loads` trusts classes."""

from haystack_integrations.components.rankers.zerank import ZerankRanker

__all__ = ["ZerankRanker"]
