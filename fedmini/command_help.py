"""How a command's help is shown: with the texts of its arguments."""

from typing import get_type_hints

import click
from typer.core import TyperArgument, TyperCommand


class HelpedCommand(TyperCommand):
    """A command whose help shows its arguments' texts: newer releases of click drop those that typer hands over.

    Typer also escapes the bracket of "[required]" for a markup that is not in use.
    """

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        hints = get_type_hints(self.callback, include_extras=True)
        arguments = [param for param in self.params if isinstance(param, TyperArgument)]
        rows = [(one.metavar or str(one.name).upper(), hints[str(one.name)].__metadata__[0].help) for one in arguments]
        if rows:
            with formatter.section("Arguments"):
                formatter.write_dl(rows)
        records = [one.get_help_record(ctx) for one in self.get_params(ctx) if isinstance(one, click.Option)]
        with formatter.section("Options"):
            formatter.write_dl([(name, text.replace("\\[", "[")) for name, text in filter(None, records)])
