"""The command `kiln`. Each command imports what it needs, so that a small one need not load a whole stack."""
# ruff: noqa: PLC0415, FBT002  (options of the command line are booleans with defaults)

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.commands_pods import repositories_app, runners_app
from cli.options import Json, Org
from kiln import __version__
from kiln.errors import KilnError

if TYPE_CHECKING:
    from cli.client import KilnClient

# What Kiln writes holds keys and logs: it is its user's alone.
PRIVATE_UMASK = 0o077

app = typer.Typer(
    help="Durable builds of machine and container images: Packer and BuildKit driven by Temporal.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
keys_app = typer.Typer(help="API keys, in the catalog of KILN_HOME; no server needs to run.", no_args_is_help=True)
builds_app = typer.Typer(help="Builds, through the API at KILN_URL with KILN_API_KEY.", no_args_is_help=True)
machines_app = typer.Typer(
    help="Organizations' machines, in the catalog of KILN_HOME and in EC2; no server needs to run.",
    no_args_is_help=True,
)
app.add_typer(keys_app, name="keys")
app.add_typer(machines_app, name="machines")
app.add_typer(runners_app, name="runners")
app.add_typer(repositories_app, name="repositories")
app.add_typer(builds_app, name="builds")

BuildId = Annotated[str, typer.Argument(help="a build's id", metavar="BUILD")]


def main() -> int:
    """The exit code: 0, or 1 after one line on standard error; 2 for a command line that is wrong."""
    os.umask(PRIVATE_UMASK)
    try:
        app()
    except KilnError as error:
        print(f"kiln: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def _version(wanted: bool) -> None:  # noqa: FBT001  typer's callback
    if wanted:
        typer.echo(f"kiln {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="print the version", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def up() -> None:
    """Run Temporal, a simulated EC2, a worker, a runner and the API in the foreground until Ctrl-C."""
    from cli.up import up as run
    from kiln.settings import load_settings

    raise typer.Exit(run(load_settings()))


@app.command()
def demo(
    container: Annotated[
        bool, typer.Option("--container", help="run the install scripts for real, in a container image (needs Docker)")
    ] = False,
) -> None:
    """Bake one AMI in a stack that is started for it, show what was made, and leave no process behind."""
    from cli import demo as demos
    from kiln.settings import load_settings

    raise typer.Exit((demos.container if container else demos.demo)(load_settings()))


@app.command()
def build(  # noqa: PLR0913, PLR0917  what a build may ask for
    provider: Annotated[str, typer.Option(help="the agent to install: claude-code, codex, gemini or cursor")],
    region: Annotated[str, typer.Option(help="AWS region of the AMI")] = "",
    instance_type: Annotated[str, typer.Option(help="EC2 instance type for the build")] = "",
    template: Annotated[str, typer.Option(help="builtin://NAME or operator://NAME")] = "",
    var: Annotated[list[str] | None, typer.Option(help="a template variable, NAME=VALUE; may be repeated")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="a tag, NAME=VALUE; may be repeated")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="print the log until the build's end")] = False,
    json: Json = False,
) -> None:
    """Start a machine build. With --follow, exit 1 unless it succeeds."""
    from cli import building, render

    wanted = {"provider": provider, "region": region, "instance_type": instance_type, "template_source": template}
    body: dict[str, Any] = {name: value for name, value in wanted.items() if value}
    body |= {"variables": building.pairs("--var", var or []), "tags": building.pairs("--tag", tag or [])}
    with _client() as client:
        accepted = client.submit(body)
        if not follow:
            render.print_json(accepted) if json else typer.echo(accepted["build_id"])
            return
        raise typer.Exit(building.follow_to_end(client, accepted["build_id"], as_json=json))


@builds_app.command("list")
def list_builds(  # noqa: PLR0913, PLR0917  the API's filters
    kind: Annotated[str, typer.Option(help="machine, container, snapshot, …; several joined with commas")] = "",
    status: Annotated[str, typer.Option(help="queued, building, …; several joined with commas")] = "",
    image: Annotated[str, typer.Option(help="an AMI's id, or a container image's digest")] = "",
    limit: Annotated[int, typer.Option(min=1, max=500, help="how many")] = 50,
    cursor: Annotated[str, typer.Option(help="next_cursor of the page before")] = "",
    json: Json = False,
) -> None:
    """List builds, newest first."""
    from cli import render

    filters: dict[str, str | int] = {"kind": kind, "status": status, "image": image, "limit": limit, "cursor": cursor}
    with _client() as client:
        page = client.builds({name: value for name, value in filters.items() if value})
    render.print_json(page) if json else render.print_builds(page["builds"])


@builds_app.command("show")
def show_build(build_id: BuildId, json: Json = False) -> None:
    """Show a build, and what it is doing while it runs."""
    from cli import render

    with _client() as client:
        shown = client.build(build_id)
    render.print_json(shown) if json else render.print_build(shown)


@builds_app.command("logs")
def build_logs(
    build_id: BuildId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on until the build's end")] = False,
    after: Annotated[int, typer.Option(min=0, help="with --follow or --json: start after this line")] = 0,
    json: Json = False,
) -> None:
    """Print a build's log so far. --json follows it to the build's end, one event a line."""
    from cli import building, render

    with _client() as client:
        if follow or json:
            building.print_events(client, build_id, after, as_json=json)
        else:
            typer.echo(render.plain_text(client.log_text(build_id)), nl=False)


@builds_app.command("cancel")
def cancel_build(build_id: BuildId, json: Json = False) -> None:
    """Ask for a build's end; it reads cancelled once nothing of it is left."""
    from cli import render

    with _client() as client:
        shown = client.cancel(build_id)
    render.print_json(shown) if json else render.print_build(shown)


@keys_app.command("create")
def create_key(  # noqa: PLR0913, PLR0917  the options of a command
    name: Annotated[str, typer.Option(help="what the key is for")] = "",
    org: Org = "default",
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="may be repeated; builds:read and builds:write by default, organization:read and :write with --hmac"
        ),
    ] = None,
    expires_in: Annotated[str, typer.Option(help="a number and s, m, h, d or w, such as 30d; never by default")] = "",
    hmac: Annotated[
        bool, typer.Option("--hmac", help="a key that signs requests of organization-images: print it and its secret")
    ] = False,
    json: Json = False,
) -> None:
    """Make an API key and print it: nobody can read it again."""
    from cli import keys, render
    from kiln.settings import load_settings

    make = keys.create_hmac_key if hmac else keys.create_key
    made = make(load_settings(), name, org, scope or [], expires_in)
    if json:
        render.print_json(made)
        return
    typer.echo(made["key"])
    if hmac:
        typer.echo(made["secret"])
    note = (
        f"{made['id']}, organization {org}, scopes {', '.join(made['scopes'])}, expires {made['expires_at'] or 'never'}"
    )
    typer.echo(note, err=True)


@keys_app.command("list")
def list_keys(json: Json = False) -> None:
    """List API keys, without the keys themselves."""
    from cli import keys, render
    from kiln.settings import load_settings

    found = keys.list_keys(load_settings())
    render.print_json({"keys": found}) if json else render.print_keys(found)


@keys_app.command("disable")
def disable_key(key_id: Annotated[str, typer.Argument(help="a key's id", metavar="KEY")], json: Json = False) -> None:
    """Shut an API key for good."""
    from cli import keys, render
    from kiln.settings import load_settings

    disabled = keys.disable_key(load_settings(), key_id)
    render.print_json(disabled) if json else typer.echo(f"{disabled['id']} is disabled")


@machines_app.command("import")
def import_machine(
    instance_id: Annotated[str, typer.Argument(help="an EC2 instance's id", metavar="INSTANCE")],
    org: Org = "default",
    region: Annotated[str, typer.Option(help="where it runs; the first of KILN_REGIONS by default")] = "",
    name: Annotated[str, typer.Option(help="the machine's name; the instance's Name tag by default")] = "",
    json: Json = False,
) -> None:
    """Take an EC2 instance in as a machine. Once an image is assigned to it, its next start replaces the instance."""
    from cli import machines, render
    from kiln.settings import load_settings

    taken = machines.import_machine(load_settings(), instance_id, org, region, name)
    render.print_json(taken) if json else typer.echo(f"machine {taken['id']}: {render.plain(taken['name'])}")


@machines_app.command("list")
def list_machines(json: Json = False) -> None:
    """List the machines of every organization, with their instances."""
    from cli import machines, render
    from kiln.settings import load_settings

    found = machines.list_machines(load_settings())
    render.print_json({"machines": found}) if json else render.print_machines(found)


@machines_app.command("remove")
def remove_machine(
    machine_id: Annotated[int, typer.Argument(help="a machine's id", metavar="MACHINE")],
) -> None:
    """Forget a machine whose instance is terminated."""
    from cli import machines
    from kiln.settings import load_settings

    machines.remove_machine(load_settings(), machine_id)
    typer.echo(f"machine {machine_id} is forgotten")


def _client() -> "KilnClient":
    from cli.client import client_of
    from kiln.settings import load_settings

    return client_of(load_settings())


if __name__ == "__main__":
    sys.exit(main())
