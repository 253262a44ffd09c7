"""The run folder: what ``fit`` leaves behind and every later verb of the workshop reads.

Its files:
    run.json               settings, facts of the fit, scalars of the network, versions
    split.json             which image is in which of the four sets
    network.safetensors    all tensors of the network, backbone included
    calibration.json       threshold and the scores behind it
    exemplars.json, .png   the training patch behind each prototype
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from meliad_edge import __version__, calibrate, exemplars
from meliad_edge.calibrate import Calibration
from meliad_edge.config import FitConfig
from meliad_edge.data.dataset import FewShotSplit
from meliad_edge.data.split import split_from_json, split_to_json
from meliad_edge.errors import ModelError
from meliad_edge.exemplars import Exemplar
from meliad_edge.models import create_detector
from meliad_edge.models.backbone import STRIDES, Backbone
from meliad_edge.models.network import DetectorNetwork

_RUN_VERSION = 4


@dataclass(frozen=True, slots=True)
class Run:
    """A trained detector with the data it was trained on.

    Attributes:
        config: Settings of the fit.
        dataset: Name of the data set.
        licence: Licence of its images, as far as known.
        split: Which image is in which set.
        network: In evaluation mode.
        calibration: Threshold and the scores behind it.
        exemplars: The training patch behind each prototype.
        learned_normals: Normal images that it was fitted on: those that could be read, and fit into memory.
        learned_shots: Labelled defects that it was fitted on.
        facts: What fitting chose by itself; JSON values.
    """

    config: FitConfig
    dataset: str
    licence: str
    split: FewShotSplit
    network: DetectorNetwork
    calibration: Calibration
    exemplars: tuple[Exemplar, ...]
    learned_normals: int
    learned_shots: int
    facts: dict[str, Any]


def save_run(run: Run, folder: Path) -> None:
    """Write a run folder; existing files of an earlier run are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.contiguous() for key, value in run.network.state_dict().items()}
    save_file(state, folder / "network.safetensors")
    _write_json(folder / "split.json", split_to_json(run.split))
    _write_json(folder / "exemplars.json", exemplars.to_fields(run.exemplars))
    if run.exemplars:
        sheet = exemplars.to_contact_sheet(run.exemplars)
        cv2.imwrite(str(folder / "exemplars.png"), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))
    save_calibration(run.calibration, folder)
    _write_json(
        folder / "run.json",
        {
            "run_version": _RUN_VERSION,
            "created_by": f"meliad-edge {__version__}",
            "config": run.config.model_dump(mode="json"),
            "dataset": run.dataset,
            "licence": run.licence,
            "input_hw": run.network.input_hw,
            "network": run.network.describe(),
            "learned_normals": run.learned_normals,
            "learned_shots": run.learned_shots,
            "facts": run.facts,
        },
    )


def save_calibration(calibration: Calibration, folder: Path) -> None:
    """Replace the calibration of a run folder."""
    _write_json(folder / "calibration.json", asdict(calibration))


def load_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        ModelError: The folder is not a run, or one of its files is missing or damaged.
    """
    if not (folder / "run.json").is_file():
        msg = f"{folder}: not a run folder (no run.json); make one with: meliad-edge fit DATA --out {folder}"
        raise ModelError(msg)
    try:
        fields = _read_json(folder / "run.json")
        if fields["run_version"] != _RUN_VERSION:
            msg = f"{folder}: run version {fields['run_version']}, this meliad-edge reads {_RUN_VERSION}; fit again"
            raise ModelError(msg)
        config = FitConfig.model_validate(fields["config"])
        state = load_file(folder / "network.safetensors")
        detector = create_detector(config.detector, config.options)
        height, width = fields["input_hw"]
        network = detector.build(
            Backbone(config.backbone, detector.strides or STRIDES, even_light=detector.even_light),
            (height, width),
            state,
            fields["network"],
        )
        return Run(
            config=config,
            dataset=str(fields["dataset"]),
            licence=str(fields["licence"]),
            split=split_from_json(_read_json(folder / "split.json")),
            network=network.eval(),
            calibration=calibrate.from_fields(_read_json(folder / "calibration.json")),
            exemplars=_read_exemplars(folder),
            learned_normals=int(fields["learned_normals"]),
            learned_shots=int(fields["learned_shots"]),
            facts=dict(fields["facts"]),
        )
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        msg = f"{folder}: run folder is damaged ({type(error).__name__}: {str(error).splitlines()[0]}); fit again"
        raise ModelError(msg) from error


def _read_exemplars(folder: Path) -> tuple[Exemplar, ...]:
    fields: Sequence[dict[str, Any]] = _read_json(folder / "exemplars.json")
    if not fields:
        return ()
    sheet = cv2.imread(str(folder / "exemplars.png"), cv2.IMREAD_COLOR)
    if sheet is None:
        msg = "exemplars.png is missing or damaged"
        raise ValueError(msg)
    return exemplars.from_fields(fields, np.asarray(cv2.cvtColor(sheet, cv2.COLOR_BGR2RGB), dtype=np.uint8))


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, value: object) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)
