"""What became of the weights of a source in a converted model."""

from dataclasses import dataclass, field

from qwen3_next.checkpoints.coverage import CoverageReport


@dataclass(frozen=True)
class TransferReport(CoverageReport):
    """A `CoverageReport` of a conversion: paths are those of the new model, `unused` ones those of
    the source.

    Attributes:
        choices: How the weights were made that the source has none for, by what they are.
    """

    choices: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [super().__str__()]
        return "\n".join(lines + [f"{what}: {how}" for what, how in self.choices.items()])
