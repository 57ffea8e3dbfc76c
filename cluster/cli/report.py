"""`maestream report`: write an HTML report of a run."""

import click

from cluster.terminal.console import console, write_file
from pipeline.storage.store import open_store
from pipeline.text import plural


@click.command()
@click.argument("run")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, writable=True),
    default="report.html",
    show_default=True,
    help="HTML file to write.",
)
def report(run: str, out: str) -> None:
    """Write an HTML report of a run.

    The run may still be training. The report is a single file for any browser, and shows the training curves, where the time
    went, events, reconstructed images, evaluations, config and versions.
    """
    from cluster.report.page import render_page
    from trainer.run.summary import summarise

    found = summarise(open_store(run))
    page = render_page(found).encode(errors="replace")
    write_file(out, page)
    console.print(
        f"wrote a report of {found.store.url}, {plural(found.steps, 'step')}, to {out} ({len(page) / 1e6:.1f} MB)"
    )
