"""Generating tokens: plain and speculative decoding, sampling, prompts."""
