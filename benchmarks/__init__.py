"""What scoring costs, measured: ours beside its rivals, on one machine, in interleaved runs."""
