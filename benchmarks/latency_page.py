"""What the HTML page shows of a measurement of ``bench``."""

from __future__ import annotations

from typing import Any

from meliad_edge import charts
from meliad_edge.benchmarks.latency import LatencyReport
from meliad_edge.report import ReportData, Table

_COLUMNS = ("stage", "p50", "p90", "p95", "p99", "p99.9", "mean", "CoV in %")


def latency_page(measured: LatencyReport, model: str, environment: dict[str, Any]) -> ReportData:
    """Collect the stages, how the time passed and where it was measured.

    Args:
        measured: The measurement.
        model: Name of the bundle.
        environment: What :func:`~meliad_edge.benchmarks.environment.describe_environment` gave.
    """
    total = measured.stages["total"]
    return ReportData(
        title=f"Latency of {model}",
        subtitle=(
            f"{total.count:,} frames of {measured.frame_hw[1]} x {measured.frame_hw[0]} pixels, file to decision: "
            f"p50 {1e3 * total.p50_s:.2f} ms, p99 {1e3 * total.p99_s:.2f} ms, {total.throughput_per_s:.0f} frames per "
            "second"
        ),
        latency=Table(
            "Milliseconds per frame, percentiles as trtexec defines them",
            _COLUMNS,
            tuple(
                (
                    name,
                    *(1e3 * s for s in (v.p50_s, v.p90_s, v.p95_s, v.p99_s, v.p999_s, v.mean_s)),
                    100.0 * v.cov,
                )
                for name, v in measured.stages.items()
            ),
            note="; ".join(f"Do not quote: {warning}" for warning in measured.warnings),
        ),
        latency_charts=(
            charts.latency_histogram([1e3 * s for s in measured.total_s], 1e3 * total.p50_s, 1e3 * total.p99_s),
            charts.latency_over_time(*([1e3 * s for s in measured.block_p50_s[stage]] for stage in ("total", "infer"))),
        ),
        provenance=_provenance(measured, environment),
    )


def _provenance(measured: LatencyReport, environment: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    facts = [
        ("engine", f"{measured.engine}, {measured.precision}"),
        ("threads", "every core" if measured.threads is None else str(measured.threads)),
        ("processor", f"{environment['cpu']}, {environment['cores']} cores"),
        ("system", str(environment["system"])),
        ("packages", ", ".join(f"{name} {version}" for name, version in environment["packages"].items())),
        ("measured", str(environment["date"])),
        ("cold start", f"{measured.cold_start_s:.2f} s, first frame {1e3 * measured.first_frame_s:.1f} ms"),
    ]
    if measured.deadline_s is not None:
        facts.append(("deadline", f"{1e3 * measured.deadline_s:g} ms, missed by {measured.deadline_misses} frames"))
    if measured.after.cpu_mhz is not None:
        facts.append(("clock", f"{measured.after.cpu_mhz:.0f} MHz"))
    if measured.after.temperature_c is not None:
        facts.append(("temperature", f"{measured.after.temperature_c:.0f} °C at the hottest sensor"))
    if measured.energy_per_frame_j is not None:
        facts.append(("energy", f"{1e3 * measured.energy_per_frame_j:.1f} mJ per frame, of the whole module"))
    return tuple(facts)
