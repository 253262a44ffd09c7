"""Published figures to compare with: image AUROC under the same protocol. None of them was run by us."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PublishedFigure:
    """One figure of a paper.

    Attributes:
        method: Name of the method.
        data: Data set, as in the table.
        setting: Setting, as in the table.
        image_auroc: In [0, 1].
        network: What it ran on, as far as known.
        source: The paper that prints the figure.
    """

    method: str
    data: str
    setting: str
    image_auroc: float
    network: str
    source: str


_FINE_TUNED = "ResNet-18 at 448 pixels, fine-tuned"
_DRA = "DRA paper (CVPR 2022)"
_AHL = "AHL paper (CVPR 2024)"
_DPDL = "DPDL paper (CVPR 2025)"

PUBLISHED = (
    PublishedFigure("DPDL", "elpv", "10-shot", 0.937, _FINE_TUNED, _DPDL),
    PublishedFigure("AHL", "elpv", "10-shot", 0.850, _FINE_TUNED, _AHL),
    PublishedFigure("DevNet", "elpv", "10-shot", 0.846, _FINE_TUNED, _DRA),
    PublishedFigure("DRA", "elpv", "10-shot", 0.845, _FINE_TUNED, _DRA),
    PublishedFigure("FLOS", "elpv", "10-shot", 0.818, _FINE_TUNED, _DRA),
    PublishedFigure("AHL", "elpv", "1-shot", 0.828, _FINE_TUNED, _AHL),
    PublishedFigure("DRA", "elpv", "1-shot", 0.675, _FINE_TUNED, _DRA),
    PublishedFigure("DevNet", "elpv", "1-shot", 0.514, _FINE_TUNED, _DRA),
    PublishedFigure("FLOS", "elpv", "1-shot", 0.457, _FINE_TUNED, _DRA),
    PublishedFigure("PatchCore", "elpv", "0-shot", 0.916, "WideResNet-50", _AHL),
    PublishedFigure("record", "elpv", "hard", 0.788, "not known to us", "second-hand; the paper was not checked"),
)
