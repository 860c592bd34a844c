"""Write a model's report: curves, scores, samples, recipe, as Markdown and as one HTML page."""

from collections.abc import Sequence
from dataclasses import dataclass

from nanozhchat import cli, paths
from nanozhchat.log import setup_logging
from nanozhchat.report import write_report


@dataclass(frozen=True, kw_only=True)
class ReportArgs:
    model_tag: str | None = cli.opt(None, "name of the model; none = the most recently trained")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, write, say where."""
    args = cli.parse(ReportArgs, argv)
    setup_logging()
    folder = write_report(args.model_tag or paths.latest_tag("metrics.jsonl"))
    print(f"report: {folder / 'report.html'}")
    print(f"        {folder / 'report.md'}")


if __name__ == "__main__":
    cli.run(main)
