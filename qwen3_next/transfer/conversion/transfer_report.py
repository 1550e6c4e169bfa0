"""What became of the weights of a source in a converted model."""

from dataclasses import dataclass, field

from qwen3_next.checkpoints.coverage import CoverageReport


@dataclass(frozen=True)
class TransferReport(CoverageReport):
    """A `CoverageReport` of a conversion: paths are those of the new model, `unused` ones those of
    the source.

    Attributes:
        choices: How the weights were made that the source has none for, by what they are.

    Example:

    ```python
    from qwen3_next import Qwen3Next, create_hybrid_from_qwen3

    qwen3 = {
        "attention_type": "group_query_attention", "normalization_type": "rms_norm",
        "partial_rotary_factor": 1.0, "full_attention_interval": 1, "num_experts": 0,
    }
    teacher = Qwen3Next.from_variant(
        "tiny", vocab_size=64, hidden_size=32, num_layers=4, head_dim=16, **qwen3
    )
    report = create_hybrid_from_qwen3(teacher, progress=False).coverage_report
    assert report.choices["decay"] == "half-life of 64 tokens"
    assert "model/layers_0/linear_attn/conv1d" in report.initialised
    ```
    """

    choices: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [super().__str__()]
        return "\n".join(lines + [f"{what}: {how}" for what, how in self.choices.items()])
