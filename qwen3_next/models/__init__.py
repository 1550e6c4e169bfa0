"""The models below their heads: backbone, cache, inputs, MTP modules, the weight table."""
