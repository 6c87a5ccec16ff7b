"""From a domain's documents and queries to a fine-tuned reranker: collect, judge, rate, calibrate, train, evaluate, export."""
