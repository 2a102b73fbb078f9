"""The base model kept in 4 bits, LoRA on it, and one gradient for each example."""
