"""Turn what a user names as a source into a local folder, downloading from the Hugging Face hub if need be."""

import re
from pathlib import Path

from conversion.errors import naming_refusals
from megatron_ads.errors import ConversionError

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # neither ./name nor ../name, which are folders
_NEEDED = ("*.safetensors", "*.json", "*.py", "*.jinja", "*.model", "*.txt", "LICENSE*")


def local_folder(source: str) -> Path:
    """Return ``source`` if it is a folder; download it if it looks like a hub id (``deepseek-ai/DeepSeek-R1``).

    Raises:
        ConversionError: If it is neither, or the download fails.
    """
    folder = Path(source)
    with naming_refusals(folder):
        if folder.exists():
            return folder
    if not _HUB_ID.fullmatch(source):
        raise ConversionError(f"{source} does not exist. Give a checkpoint folder, or a hub id such as owner/name.")
    return _download(source)


def _download(hub_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise ConversionError(
            f"{hub_id} is not a folder, and downloading it from the hub needs huggingface-hub, which is not installed."
        ) from None
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_NEEDED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConversionError(
            f"{hub_id} is not a folder here and could not be downloaded from the hub: {reason}. "
            "Check the name and the network, or download it elsewhere and give the folder."
        ) from None
