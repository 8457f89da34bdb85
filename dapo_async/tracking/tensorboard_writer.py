"""Event files for TensorBoard: metrics come in, files in `tensorboard/` of the run leave.

The only module that imports `tensorboard` (extra `tensorboard`). It writes the protocol buffers
itself, because torch's SummaryWriter imports torch, which the driver does without.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EVENT_FILES = "events.out.tfevents.*"
FLUSH_S = 10


class TensorBoardWriter:
    """A `MetricWriter` for one folder. Every method raises what the library raises."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event_pb2: Any = event_pb2
        self._summary_pb2: Any = summary_pb2
        # TensorBoard drops what the earlier files of a resumed run hold of later steps.
        self._is_resumed = folder.is_dir() and any(folder.glob(EVENT_FILES))
        folder.mkdir(parents=True, exist_ok=True)
        self._file: Any = EventFileWriter(str(folder), flush_secs=FLUSH_S)

    def log(self, step: int, values: Mapping[str, float], *, time_s: float) -> None:
        """One event with all values of a step."""
        if self._is_resumed:
            self._is_resumed = False
            start = self._event_pb2.SessionLog(status=self._event_pb2.SessionLog.START)
            self._add(step, time_s, session_log=start)
        value = self._summary_pb2.Summary.Value
        shown = [value(tag=name, simple_value=number) for name, number in values.items()]
        self._add(step, time_s, summary=self._summary_pb2.Summary(value=shown))

    def close(self, status: str, reason: str) -> None:
        """Adds how the run ended as a text, and closes the file."""
        self._add(0, time.time(), summary=self._text("status", f"{status}: {reason}"))
        self._file.close()

    def _text(self, name: str, text: str) -> Any:
        """A summary that TensorBoard's text page shows."""
        from tensorboard.compat.proto import tensor_pb2, tensor_shape_pb2
        from tensorboard.compat.proto.types_pb2 import DT_STRING

        summary = self._summary_pb2
        plugin = summary.SummaryMetadata.PluginData(plugin_name="text")
        shape = tensor_shape_pb2.TensorShapeProto(
            dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=1)]
        )
        tensor = tensor_pb2.TensorProto(
            dtype=DT_STRING, string_val=[text.encode()], tensor_shape=shape
        )
        metadata = summary.SummaryMetadata(plugin_data=plugin)
        return summary.Summary(
            value=[summary.Summary.Value(tag=name, metadata=metadata, tensor=tensor)]
        )

    def _add(self, step: int, time_s: float, **content: Any) -> None:
        self._file.add_event(self._event_pb2.Event(step=step, wall_time=time_s, **content))
