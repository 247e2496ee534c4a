"""Commands ``k2 cluster ...``: describe machines once, so that other commands can name them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from k2cli.commands.cluster.clean import clean
from k2cli.commands.cluster.prepare import prepare
from k2cli.commands.options import AsJson, ClusterName

_HELP = "Describe your machines, install k2 on them, and show what runs there."

NewName = Annotated[str, typer.Option("--name", help="Name of the new cluster.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a cluster of the same name.")]

cluster = typer.Typer(
    name="cluster",
    help=_HELP,
    short_help=_HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def init(
    hosts: Annotated[
        list[str],
        typer.Argument(metavar="HOST", help="SSH names of the machines; localhost is this one."),
    ],
    name: NewName = "default",
    force: Force = False,
    json: AsJson = False,
) -> None:
    """Describe a cluster: ask its machines for memory, chip, networks, Thunderbolt and RDMA.

    Example: k2 cluster init localhost studio-2 --name studios
    """
    from k2cli.cluster.description import cluster_path, save_cluster
    from k2cli.cluster.discovery import discover
    from k2cli.cluster.links import same_machines
    from k2cli.errors import UsageError
    from k2cli.ui.cluster_view import print_cluster, show_answer
    from k2cli.ui.output import note, print_json, warn

    if cluster_path(name).exists() and not force:
        raise UsageError(
            f"cluster '{name}' already exists", f"k2 cluster refresh {name}, or --force"
        )
    note(f"asking {', '.join(hosts)}")
    found = discover(name, hosts, show_answer)
    path = save_cluster(found)
    for pair in same_machines(found):
        warn(f"{' and '.join(pair)} have the same addresses and may be one machine")
    if json:
        print_json({"schema_version": found.schema_version, "cluster": found})
    else:
        print_cluster(found)
    note(f"saved as {path}; next: k2 doctor {name}")


def refresh(name: ClusterName = None, json: AsJson = False) -> None:
    """Ask the machines of a cluster again, for example after an update or with new cables.

    Example: k2 cluster refresh studios
    """
    from k2cli.cluster.description import load_cluster, save_cluster
    from k2cli.cluster.discovery import discover
    from k2cli.ui.cluster_view import print_cluster, show_answer
    from k2cli.ui.output import print_json

    known = load_cluster(name)
    found = discover(known.name, [node.name for node in known.nodes], show_answer, known.hostfile)
    save_cluster(found)
    if json:
        print_json({"schema_version": found.schema_version, "cluster": found})
    else:
        print_cluster(found)


def show(
    name: ClusterName = None,
    json: AsJson = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Do not ask the machines what runs there.")
    ] = False,
) -> None:
    """Show the machines of a cluster, the links between them, and what runs there.

    Example: k2 cluster show studios
    """
    from k2cli.cluster.description import load_cluster
    from k2cli.cluster.discovery import node_activities
    from k2cli.ui.cluster_view import print_cluster
    from k2cli.ui.output import print_json

    found = load_cluster(name)
    running, problems = node_activities(found) if not offline else (None, None)
    if json:
        document = {"schema_version": found.schema_version, "cluster": found}
        print_json(document | {"activity": running, "problems": problems})
    else:
        print_cluster(found, running, problems)


def list_(json: AsJson = False) -> None:
    """List the clusters described on this machine.

    Example: k2 cluster list
    """
    from k2cli.cluster.description import SCHEMA_VERSION, list_clusters, load_cluster
    from k2cli.ui.cluster_view import print_cluster_names
    from k2cli.ui.output import print_json

    found = [load_cluster(name) for name in list_clusters()]
    if json:
        print_json({"schema_version": SCHEMA_VERSION, "clusters": found})
    else:
        print_cluster_names(found)


def import_(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Hostfile of mlx.launch or Open MPI.")
    ],
    name: NewName = "default",
    force: Force = False,
    offline: Annotated[bool, typer.Option("--offline", help="Do not ask the machines.")] = False,
) -> None:
    """Describe a cluster from a hostfile of mlx.launch or Open MPI, kept for k2 cluster export.

    Example: k2 cluster import hosts.json --name studios
    """
    from k2cli.cluster.description import cluster_path, save_cluster
    from k2cli.cluster.discovery import cluster_from_hostfile, discover
    from k2cli.cluster.hostfile import read_hostfile
    from k2cli.errors import UsageError
    from k2cli.ui.cluster_view import print_cluster, show_answer

    if cluster_path(name).exists() and not force:
        raise UsageError(f"cluster '{name}' already exists", "--name ANOTHER, or --force")
    hostfile = read_hostfile(file)
    bare = cluster_from_hostfile(name, hostfile)
    hosts = [node.name for node in bare.nodes]
    found = bare if offline else discover(name, hosts, show_answer, hostfile)
    save_cluster(found)
    print_cluster(found)


def export(
    name: ClusterName = None,
    transport: Annotated[
        str, typer.Option("--backend", help="ring, jaccl or mpi. Default: the best available one.")
    ] = "",
) -> None:
    """Print a cluster as a hostfile for mlx.launch.

    Example: k2 cluster export studios > hosts.json
    """
    from k2cli.cluster.description import load_cluster
    from k2cli.cluster.hostfile import format_hostfile
    from k2cli.cluster.links import to_hostfile
    from k2cli.ui.output import print_text

    print_text(format_hostfile(to_hostfile(load_cluster(name), transport)))


def remove(
    name: Annotated[str, typer.Argument(metavar="CLUSTER", help="Name of the cluster.")],
) -> None:
    """Delete the description of a cluster; its machines are not changed.

    Example: k2 cluster remove studios
    """
    from k2cli.cluster.description import remove_cluster
    from k2cli.ui.output import note

    remove_cluster(name)
    note(f"removed {name}")


for _name, _command in (
    ("init", init),
    ("show", show),
    ("list", list_),
    ("prepare", prepare),
    ("clean", clean),
    ("refresh", refresh),
    ("import", import_),
    ("export", export),
    ("remove", remove),
):
    # Given in full, because typer would cut off a long line in the list of commands.
    _short = " ".join((_command.__doc__ or "").split("\n\n")[0].split())
    cluster.command(_name, short_help=_short)(_command)
