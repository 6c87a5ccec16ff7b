"""ZerankRanker for Haystack 3, at the module path that `Pipeline.loads` trusts.

The folders above this one have no `__init__.py`: other distributions put their own rankers beside it.
"""

try:
    import haystack  # noqa: F401 - only to see whether it is there
except ImportError as error:
    if error.name != "haystack":
        raise
    from zerank_integrations.errors import MissingPackage

    msg = 'haystack-ai is not installed; ZerankRanker needs version 3. Run: pip install "zerank-integrations[haystack]"'
    raise MissingPackage(msg, name="haystack") from error

from haystack_integrations.components.rankers.zerank.ranker import ZerankRanker

__all__ = ["ZerankRanker"]
