"""A small causal language model, made smaller in several ways."""
