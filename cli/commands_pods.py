"""`kiln runners` and `kiln repositories`: what pods run on, and what they work on."""
# ruff: noqa: PLC0415, FBT002  (as in main.py)

from typing import Annotated

import typer

from cli.options import Json, Org

runners_app = typer.Typer(
    help="Runners, which pods run on, in the catalog of KILN_HOME; no server needs to run.", no_args_is_help=True
)
repositories_app = typer.Typer(
    help="Git repositories that pods work on, in the catalog of KILN_HOME; no server needs to run.",
    no_args_is_help=True,
)


@runners_app.command("create")
def create_runner(
    name: Annotated[str, typer.Argument(help="its name, one of its own in the organization", metavar="NAME")],
    org: Org = "default",
    json: Json = False,
) -> None:
    """Make a runner and print its token, KILN_RUNNER_TOKEN of its worker: nobody can read it again."""
    from cli import render, runners
    from kiln.settings import load_settings

    made = runners.create_runner(load_settings(), name, org)
    if json:
        render.print_json(made)
        return
    typer.echo(made["token"])
    typer.echo(f"{made['id']}, organization {org}, runner {render.plain(name)}", err=True)


@runners_app.command("list")
def list_runners(json: Json = False) -> None:
    """List the runners of every organization, without their tokens."""
    from cli import render, runners
    from kiln.settings import load_settings

    found = runners.list_runners(load_settings())
    render.print_json({"runners": found}) if json else runners.print_runners(found)


@runners_app.command("disable")
def disable_runner(
    runner_id: Annotated[str, typer.Argument(help="a runner's id", metavar="ID")], json: Json = False
) -> None:
    """Shut a runner's token for good. Its agents end when their lease does."""
    from cli import render, runners
    from kiln.settings import load_settings

    disabled = runners.disable_runner(load_settings(), runner_id)
    render.print_json(disabled) if json else typer.echo(f"{disabled['id']} is disabled")


@repositories_app.command("add")
def add_repository(  # noqa: PLR0913, PLR0917  what a repository is made of
    name: Annotated[str, typer.Argument(help="its name, one of its own in the organization", metavar="NAME")],
    url: Annotated[str, typer.Argument(help="as git clones it, without user or password", metavar="URL")],
    branch: Annotated[str, typer.Option(help="the branch of pods that name none")] = "main",
    credential_file: Annotated[
        str,
        typer.Option(help="a file with what opens the repository: a token, or USER:PASSWORD; - reads it from stdin"),
    ] = "",
    org: Org = "default",
    json: Json = False,
) -> None:
    """Register a git repository that pods may work on, and print its id."""
    from cli import render, repositories
    from kiln.settings import load_settings

    added = repositories.add_repository(load_settings(), name, url, branch, credential_file, org)
    render.print_json(added) if json else typer.echo(added["id"])


@repositories_app.command("list")
def list_repositories(json: Json = False) -> None:
    """List the repositories of every organization, without their credentials."""
    from cli import render, repositories
    from kiln.settings import load_settings

    found = repositories.list_repositories(load_settings())
    render.print_json({"repositories": found}) if json else repositories.print_repositories(found)


@repositories_app.command("remove")
def remove_repository(
    repository_id: Annotated[int, typer.Argument(help="a repository's id", metavar="ID")],
) -> None:
    """Forget a repository that no open pod works on, with its credential."""
    from cli import repositories
    from kiln.settings import load_settings

    repositories.remove_repository(load_settings(), repository_id)
    typer.echo(f"repository {repository_id} is forgotten")
