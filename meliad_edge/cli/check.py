"""``meliad-edge check``: does the exported model decide as the trained one?"""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path
from typing import Annotated

import typer

from meliad_edge.cli.options import BundleFile, Json
from meliad_edge.cli.output import print_json, print_table, require_extra


def command(
    model: BundleFile,
    against: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Run folder the bundle was exported from.")
    ] = None,
    json: Json = False,
) -> None:
    """Prove that a bundle decides as the run it came from.

    Without --against only the golden frames inside the bundle are replayed. TensorRT is checked where an engine was
    built beside the bundle.
    """
    from meliad_edge.errors import ParityError
    from meliad_edge.parity import check_golden, require_parity
    from meliad_edge.runtime.load import load_built_engines, load_engine, open_trusted

    bundle = open_trusted(model)
    run = None
    with ExitStack() as opened:
        built = {
            precision: opened.enter_context(closing(engine)) for precision, engine in load_built_engines(bundle).items()
        }
        results = [
            check_golden(bundle, engine, precision)
            for precision in bundle.models
            for engine in (load_engine(bundle, precision), built.get(precision))
            if engine is not None
        ]
        if against is not None:
            require_extra("torch", "train")
            require_extra("onnx", "export")
            from meliad_edge.export.engines import processor_engines
            from meliad_edge.export.to_bundle import check_parity, read_replay
            from meliad_edge.run import load_run

            run = load_run(against)
            replay = read_replay(run).replay
            for precision, graph in bundle.models.items():
                on_gpu = [built[precision]] if precision in built else []
                results += check_parity(run, [*processor_engines(graph), *on_gpu], precision, replay)
    if json:
        print_json({"passed": all(r.passed for r in results), "engines": [r.to_dict() for r in results]})
    else:
        print_table(
            ("engine", "precision", "frames", "score error", "map error", "rank swaps", "label flips", "verdict"),
            [
                (
                    r.engine,
                    r.precision,
                    str(r.frames),
                    f"{r.score_error:.3%} of {r.limits.score:.0%}",
                    f"{r.map_error:.3%} of {r.limits.map:.0%}",
                    str(r.rank_swaps),
                    str(len(r.label_flips)),
                    "same decisions" if r.passed else "DIFFERENT",
                )
                for r in results
            ],
            caption="errors, of the largest that pass, in per cent of the distance from the typical normal score to "
            "the threshold",
        )
    require_parity(results)
    if run is not None and run.calibration.threshold != bundle.calibration.threshold:
        msg = (
            f"the bundle decides at {bundle.calibration.threshold:.4f}, the run at {run.calibration.threshold:.4f}: "
            "it was calibrated again after the export; export it again"
        )
        raise ParityError(msg)
