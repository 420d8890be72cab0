"""Where an adapter is: in a folder, among those that come with the package, or on the hub."""

from pathlib import Path

from layerroute.errors import AdapterError, near
from layerroute.files import expanded
from layerroute.models.loading import only_cached

MANIFEST = "layerroute.json"
SHIPPED = Path(__file__).parents[1] / "adapters"
HUB = "hf:"


def shipped() -> tuple[str, ...]:
    """Return the names of the adapters that come with the package."""
    return tuple(sorted(path.parent.name for path in SHIPPED.glob(f"*/{MANIFEST}")))


def is_adapter(name: str | Path) -> bool:
    """Return whether `name` is an adapter's; what stands on the hub is believed."""
    return (expanded(name) / MANIFEST).is_file() or str(name) in shipped() or str(name).startswith(HUB)


def find_adapter(name: str | Path) -> Path:
    """Return the folder of an adapter.

    Args:
        name: a folder, one of `shipped()`, or `hf:owner/name`, which is fetched unless a copy is cached.

    Raises:
        AdapterError: nothing of that name, or the hub can't be reached.
    """
    folder, text = expanded(name), str(name)
    if text in shipped() and not (folder / MANIFEST).is_file():  # a folder that happens to be called so hides nothing
        return SHIPPED / text
    if folder.is_dir():
        return folder
    if text.startswith(HUB):
        return _fetched(text)
    raise AdapterError(
        f"{name}: no adapter here. Give a folder, hf:owner/name, or a shipped one.{near(text, shipped())}"
    )


def _fetched(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "README.md"]
    try:
        return Path(
            snapshot_download(name.removeprefix(HUB), allow_patterns=wanted, local_files_only=only_cached(name))
        )
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise AdapterError(
            f"{name}: the model hub can't be reached or has no such adapter, and no copy is cached "
            f"({(str(error).splitlines() or [type(error).__name__])[0]}). Give a folder or a shipped one."
            f"{near(name.rpartition('/')[2], shipped())}"
        ) from error
