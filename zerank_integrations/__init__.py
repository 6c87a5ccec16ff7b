"""An open home for the zerank rerankers."""
