"""What no receipt names: files of attempts that died, lost a race or were replaced.

neuronlens clean STORE --dry-run
"""

from collections.abc import Callable
from dataclasses import dataclass

from neuronlens.store import Store

_DATA_FOLDERS = (
    *("samples", "partials", "histograms", "predictions", "raw"),
    *("moments", "merged_histograms", "distributions", "overlap", "salience"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Orphan:
    """A file that does not count. `path` is relative to the store."""

    path: str
    n_bytes: int


def orphans(store: Store) -> list[Orphan]:
    """Data files that no receipt names, and drafts that were never given their name. Whatever else lies in the folder
    is not ours to judge.

    Only meaningful while no driver works on the store: what one is about to commit looks the same. Raises UsageError
    where there is no store.
    """
    store.describe()
    counted = {file.path for file in store.committed_files()}
    found = []
    root = store.fs._strip_protocol(store.root)
    for path, info in store.fs.find(store.root, detail=True, withdirs=False).items():
        relative = path.removeprefix(root).lstrip("/")
        folder, name = relative.partition("/")[0], relative.rpartition("/")[2]
        is_data = folder in _DATA_FOLDERS and relative not in counted
        is_draft = (name.startswith(".") and ".json." in name) or (folder == "ranges" and name.endswith(".tmp"))
        if is_data or is_draft:
            found.append(Orphan(path=relative, n_bytes=int(info["size"] or 0)))
    return sorted(found, key=lambda orphan: orphan.path)


def clean(store: Store, found: list[Orphan], on_file: Callable[[Orphan], None] = lambda _: None) -> None:
    """Remove them. Hold the store's lease meanwhile."""
    for orphan in found:
        store.remove(orphan.path)
        on_file(orphan)
