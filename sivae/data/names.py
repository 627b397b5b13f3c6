"""What a packed set's images were called where they came from: `names.json` beside the index, key -> name.

For people, who look for their own file or join latents with a table of theirs. Nothing is read by it, and it is not part of the
set's digest.
"""

import json
from collections.abc import Sequence

from sivae.data.index import Index
from sivae.errors import UserError, shown
from sivae.storage import Folder

FILE_NAME = "names.json"


def write_names(folder: Folder, index: Index, names: Sequence[str]) -> None:
    """`names` of all images of the source, by their numbers, which are the keys."""
    held = {key: str(names[int(key)]).encode(errors="backslashreplace").decode() for key in index.key}
    folder.write(json.dumps(held, ensure_ascii=False).encode(), FILE_NAME)


def read_names(folder: Folder) -> dict[str, str]:
    """Empty where there are none. Raises UserError for a damaged file."""
    try:
        if not folder.exists(FILE_NAME):
            return {}
    except UserError as error:
        # What a bucket that may be read and not listed says of a file that is not there.
        if isinstance(error.__cause__, PermissionError) or getattr(error.__cause__, "status", None) == 403:
            return {}
        raise
    try:
        held = json.loads(folder.read(FILE_NAME))
        if not all(isinstance(name, str) for name in held.values()):
            raise ValueError("a name is no text")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{shown(folder.url)}/{FILE_NAME}: is damaged ({error}); delete it, or copy it again") from None
    return held
