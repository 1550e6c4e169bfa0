"""A checkpoint like Qwen3's of a given size, with random weights.

    python -m benchmarks.qwen3_checkpoint DIRECTORY MEBIBYTES

Written by a process of its own, so that the memory this takes is not counted as that of who reads
it. Layers of 1,024 are added until the size is reached, in bfloat16 shards of at most 256 MB.
"""

import subprocess
import sys
from pathlib import Path

BUILD = Path(__file__).resolve().parents[1] / "build"
CONFIG = {
    "vocab_size": 32768,
    "hidden_size": 1024,
    "full_attention_interval": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "max_position_embeddings": 32768,
    "partial_rotary_factor": 1.0,
    "tie_word_embeddings": True,
    "num_experts": 0,
    "attention_type": "group_query_attention",
    "normalization_type": "rms_norm",
}


def checkpoint(mebibytes):
    """The directory of a checkpoint of about that size, which is written where there is none."""
    directory = BUILD / f"qwen3_{mebibytes}_mib"
    if not (directory / "config.json").exists():
        command = [sys.executable, "-m", "benchmarks.qwen3_checkpoint", directory, mebibytes]
        subprocess.run(list(map(str, command)), cwd=BUILD.parent, check=True)
    return directory


def main():
    from qwen3_next import Qwen3Next, describe
    from qwen3_next.config import Qwen3NextConfig

    directory, mebibytes = sys.argv[1], int(sys.argv[2])
    one, two = (describe(Qwen3NextConfig(num_layers=n, **CONFIG)).total for n in (1, 2))
    layers = max(1, round((mebibytes * 2**20 / 2 - one) / (two - one)) + 1)
    model = Qwen3Next(num_layers=layers, dtype="bfloat16", **CONFIG)
    model.export_to_transformers(directory, max_shard_size="256MB")


if __name__ == "__main__":
    main()
