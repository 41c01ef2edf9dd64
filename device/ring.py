"""The features of the last N frames, by frame id: what `learn` can still name. Images are not kept."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from device.contract.errors import LearningError

MAX_BYTES = 16 << 20
"""Most memory of a ring, for rows and ids; the largest board profile asks for 4 MB."""
_ID_BYTES = 512

log = logging.getLogger(__name__)


class FeatureRing:
    """A fixed buffer [N, D] of at most `MAX_BYTES`; written by the frame loop, read by the command thread."""

    def __init__(self, capacity: int, feature_dim: int) -> None:
        most = max(MAX_BYTES // (4 * feature_dim + _ID_BYTES), 1)
        if capacity > most:
            log.warning("runtime.feature_ring = %d is too much memory; the last %d frames are kept", capacity, most)
            capacity = most
        self._rows = np.zeros((capacity, feature_dim), np.float32)  # [N, D]
        self._row_of: OrderedDict[str, int] = OrderedDict()  # oldest first
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._row_of)

    def add(self, frame_id: str, features: np.ndarray) -> None:
        """Keep a frame's features [D]; the oldest go when the ring is full, the earlier ones of the same id always."""
        with self._lock:
            row = self._row_of.pop(frame_id, None)
            if row is None:
                is_full = len(self._row_of) == len(self._rows)
                row = self._row_of.popitem(last=False)[1] if is_full else len(self._row_of)
            self._rows[row] = features
            self._row_of[frame_id] = row

    def get(self, frame_ids: Sequence[str]) -> np.ndarray:
        """The features [n, D] of frames; LearningError names the first one that is not held."""
        with self._lock:
            for frame_id in frame_ids:
                if frame_id not in self._row_of:
                    raise LearningError(
                        f"frame {frame_id!r} is not among the last {len(self._row_of)} frames; send a newer frame or its features"
                    )
            return self._rows[[self._row_of[frame_id] for frame_id in frame_ids]]
