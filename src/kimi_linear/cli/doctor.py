"""`kimi-linear doctor`."""

import typer


def doctor() -> None:
    """Say what this installation can use: processor, native kernels, threads, torch, GPUs, optional packages."""
    # Loading torch takes seconds; --help should not.
    from kimi_linear.recipes.doctor import examine

    findings = examine()
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        typer.echo(f"{'ok  ' if finding.good else 'note'}  {finding.subject:{width}}  {finding.text}")
