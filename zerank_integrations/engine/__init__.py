"""How a forward pass is spent: prompts in, logits out."""
