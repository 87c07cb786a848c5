"""`kimi-linear doctor`."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from kimi_linear.base.errors import ConfigError

if TYPE_CHECKING:
    from kimi_linear.recipes.checkup import Evidence, Finding


def doctor(
    path: str | None = typer.Argument(
        None, help="A checkpoint directory, or a hub name in the local cache. Default: look at this installation."
    ),
    fix: Path | None = typer.Option(None, help="Write a repaired copy there; the original is only read."),  # noqa: B008
    values: bool = typer.Option(False, "--values", help="Read every tensor too: NaN, zeros, repeated matrices."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of text."),
) -> None:
    """Say what engines trip over in a checkpoint, and repair a copy; or what this installation can use.

    Exit code 1 if a checkpoint, or its repaired copy, has errors.
    """
    if path is not None:
        _checkpoint(path, fix, values, as_json)
    elif fix is not None or values:
        raise ConfigError("--fix and --values are for a checkpoint; give its directory.")
    else:
        _installation(as_json)


def _installation(as_json: bool) -> None:
    # Loading torch takes seconds; --help should not.
    from kimi_linear.recipes.doctor import examine

    findings = examine()
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
        return
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        typer.echo(f"{'ok  ' if finding.good else 'note'}  {finding.subject:{width}}  {finding.text}")


def _checkpoint(path: str, fix: Path | None, values: bool, as_json: bool) -> None:
    from kimi_linear.recipes.checkup import check, gather, repair

    evidence = gather(path)
    findings = [*check(evidence), *(_values(evidence, quiet=as_json) if values else [])]
    if not as_json:
        _show(findings)
    left, found = findings, {"path": str(evidence.directory), "findings": _plain(findings)}
    if fix is not None:
        result = repair(path, fix)
        # The copy has the same numbers.
        left = [*result.left, *(finding for finding in findings if finding.check == "values")]
        found |= {"copy": str(result.target), "fixed": _plain(result.fixed), "left": _plain(left)}
        if not as_json:
            typer.echo(f"\nwrote {result.target}: {len(result.fixed)} findings fixed, left are:")
            _show(left)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    if any(finding.severity == "error" for finding in left):
        raise typer.Exit(1)


def _values(evidence: "Evidence", quiet: bool) -> "list[Finding]":
    from tqdm import tqdm

    from kimi_linear.recipes.checkup import check_values
    from kimi_linear.recipes.checkup.values import total_bytes

    with tqdm(total=total_bytes(evidence), unit="B", unit_scale=True, leave=False, disable=quiet or None) as bar:
        return check_values(evidence, bar.update)


def _show(findings: "list[Finding]") -> None:
    for finding in findings:
        typer.echo(f"{finding.severity:8}{finding.check:10}{finding.text}")
        if finding.severity != "ok":
            typer.echo(f"{'':18}for {', '.join(finding.affects)}; to do: {finding.fix}")
            if finding.fixable:
                typer.echo(f"{'':18}--fix DIR does it")


def _plain(findings: "tuple[Finding, ...] | list[Finding]") -> list[dict[str, object]]:
    return [dataclasses.asdict(finding) for finding in findings]
