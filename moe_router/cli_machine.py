"""The commands about machines: what this one can do, and what another one would."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moe_router.cli_options import AsJson, Set, one_line_errors, print_json

Links = Annotated[bool, typer.Option("--links", help="time tokens between two ranks here instead")]


def doctor(as_json: AsJson = False, links: Links = False) -> None:
    """What this machine has and lacks, each with the fix. Exit code 1 if training cannot start."""
    if links:
        _print_links(as_json)
        return
    from moe_router.doctor import examine
    from moe_router.tables import doctor_table

    findings = examine()
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        Console().print(doctor_table(findings))
    if any(finding.status == "missing" for finding in findings):
        raise typer.Exit(1)


def _print_links(as_json: bool) -> None:
    from moe_router.dispatch.probe import probe
    from moe_router.tables_links import links_table

    link, probes = probe()
    if as_json:
        print_json({"link": asdict(link), "probes": [asdict(found) for found in probes]})
    else:
        Console().print(links_table(link, probes))


def simulate(
    recording: Annotated[Path, typer.Argument(help="a run of run.record=true, or a file")],
    topology: Annotated[Path, typer.Argument(help="a YAML file: docs/scaling.md")],
    set_: Set = None,
    as_json: AsJson = False,
    compact: Annotated[
        Path | None, typer.Option(help="write the recording there, 2 bytes a choice")
    ] = None,
) -> None:
    """Step time and balance of a recorded routing on another machine. --set asks what-if."""
    with one_line_errors():
        from moe_router import simulation
        from moe_router.tables_links import simulated_facts, simulated_table

        machine = simulation.load_topology(topology, set_ or ())
        recorded = simulation.load_recording(recording)
        found = simulation.simulate(recorded, machine)
        if compact is not None:
            simulation.save_recording(recorded, compact)
        if as_json:
            print_json(asdict(found) | {"tokens_per_s": found.tokens_per_s})
            return
        console = Console()
        console.print(simulated_table(found, str(topology)))
        console.print(*simulated_facts(found), sep="\n", highlight=False)
