"""What clients keep between rounds, on disk."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from rolora.errors import RoloraError
from rolora.files import make_folder, write_file

KEPT_STATES = 3  # per client: two that checkpoints may need, and the one being written
SENT_AGAIN = ("received", "sent")  # kinds that a coordinator sends whole to a site without them
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClientStore:
    """What clients keep, on disk: one file per client and round, so memory does not grow.

    A client's state for round t is the newest file of an earlier round, so a retried or resumed
    round starts from the same state as the first attempt. ``kind`` is the prefix of the file names:
    "round" for personal adapters, "residual" for what an upload rounded away, "moments" for an
    optimiser's state; sites also keep what they "received" and "sent".
    """

    folder: Path
    kind: str = "round"

    def read(self, client: str, before: int) -> dict[str, Tensor]:
        """The client's tensors as of the last round before this one; {} if none.

        A damaged file of a kind that is sent again counts as none. RoloraError for any other: what
        it held is nowhere else.
        """
        earlier = [file for round, file in self._files(client) if round < before]
        if not earlier:
            return {}
        try:
            return load_file(earlier[-1])
        except (SafetensorError, OSError) as error:
            if self.kind in SENT_AGAIN:
                _log.warning("%s is damaged (%s) and is sent again", earlier[-1], error)
                return {}
            raise RoloraError(
                f"{earlier[-1]} is damaged ({error}): put it back, or delete it, and {client} goes "
                "on from what it kept before"
            ) from error

    def write(self, client: str, round: int, kept: Mapping[str, Tensor]) -> None:
        """Write the state after this round; of older ones keep what two checkpoints may need."""
        make_folder(self.folder / client)
        write_file(self.folder / client / f"{self.kind}-{round:06d}.safetensors", save(dict(kept)))
        files = self._files(client)
        past = [file for at, file in files if at <= round]
        for file in [*past[:-KEPT_STATES], *(file for at, file in files if at > round)]:
            file.unlink()

    def forget(self, client: str, after: int) -> None:
        """Delete the states of rounds later than this one, which were never finished."""
        for round, file in self._files(client):
            if round > after:
                file.unlink()

    def _files(self, client: str) -> list[tuple[int, Path]]:
        found = sorted((self.folder / client).glob(f"{self.kind}-*.safetensors"))
        return [(int(file.stem.removeprefix(f"{self.kind}-")), file) for file in found]
