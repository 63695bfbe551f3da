"""Options that commands of more than one file have."""

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="print JSON")]
Org = Annotated[str, typer.Option(help="the organization; made if it is not there")]
