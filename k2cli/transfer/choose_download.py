"""``k2 download --cluster``: a model is downloaded once, and each verified file is passed on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from k2cli.agent.weights.messages import ModelFiles, Target, WeightsFile
from k2cli.agent.weights.model_files import header_lengths
from k2cli.cluster.description import load_cluster
from k2cli.cluster.node_lookup import cluster_nodes
from k2cli.errors import UsageError
from k2cli.models.reference import parse_reference
from k2cli.models.sources.events import Event
from k2cli.models.sources.hub_download import HubDownload, plan_download, run_download
from k2cli.models.sources.hub_headers import remote_checkpoint
from k2cli.models.sources.parallel_download import FileFinished
from k2cli.models.sources.range_stream import DownloadOptions
from k2cli.models.sources.selection import Selection
from k2cli.nodes.local import LocalNode
from k2cli.planning.plan import read_plan
from k2cli.transfer.choose_push import rank_names
from k2cli.transfer.feed import OnFile
from k2cli.transfer.parts import files_of_nodes
from k2cli.transfer.request import PushRequest


@dataclass(frozen=True, slots=True)
class ClusterDownload:
    """A download that is passed on: who gets what, and what this machine fetches."""

    request: PushRequest
    download: HubDownload
    options: DownloadOptions

    def feed(self, add: OnFile) -> None:
        """Download, and name each file that is there; every event asks whether to go on."""
        for file in self.download.files:
            if not file.missing_bytes:
                add(file.place.file.name)

        def on_event(event: Event) -> None:
            add(event.file.name if isinstance(event, FileFinished) else None)

        run_download(self.download, self.options, on_event)
        for file in self.download.files:
            add(file.place.file.name)


def choose_download(
    text: str,
    revision: str | None,
    cluster_name: str,
    plan_file: Path | None,
    selection: Selection,
    options: DownloadOptions,
) -> ClusterDownload | None:
    """Choose what is downloaded and who gets what; None if the model is not one of a repository.

    Args:
        text: the model reference.
        revision: overrides that of the reference.
        cluster_name: the cluster whose nodes get the model.
        plan_file: a plan; nodes then get what its ranks read. None for the whole model.
        selection: the files of the repository that are fetched, and of which nodes get theirs.
        options: of the download to this machine.

    Raises:
        UsageError: if plan and cluster do not fit together.
        K2Error: if the Hub cannot be reached, or has no such model.
    """
    reference = parse_reference(text)
    if reference.repo is None:
        if revision is not None:
            raise UsageError(f"'{text}' has no revisions", "leave --revision out")
        return None
    cluster = load_cluster(cluster_name)
    plan = read_plan(plan_file) if plan_file is not None else None
    ranks = rank_names(cluster, plan)
    download = plan_download(reference.repo, revision or reference.revision, None, selection)
    wanted, headers = {}, {}
    if plan is not None:
        checkpoint = remote_checkpoint(reference.repo, download.listing.commit)
        wanted = files_of_nodes(checkpoint, plan.placement, ranks)
        headers = header_lengths(checkpoint)
    nodes = tuple(node for node in cluster_nodes(cluster) if not node.is_local)
    request = PushRequest(
        text, LocalNode(), _model_files(download, headers), nodes, wanted, cluster
    )
    return ClusterDownload(request, download, options)


def _model_files(download: HubDownload, headers: dict[str, int]) -> ModelFiles:
    """List the files of a download as if they were here."""
    listing = download.listing
    references = () if listing.revision == listing.commit else (listing.revision,)
    files = tuple(
        WeightsFile(file.place.file.name, file.place.file.nbytes, file.place.file.blob_name)
        for file in download.files
    )
    target = Target("hub", listing.repo, listing.commit, references)
    return ModelFiles(str(download.folder), target, files, {}, headers, record=download.record)
