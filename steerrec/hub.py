"""MODEL and ARTIFACT folders on the Hugging Face Hub: `push` and `pull`."""

from steerrec.pulling import Snapshot, pull
from steerrec.pushing import Pushed, push

__all__ = ["Pushed", "Snapshot", "pull", "push"]
