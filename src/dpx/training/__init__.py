"""A run from data to release: one compiled step, its repetition, records that survive a crash, and what is published."""

from ._callbacks import StepInfo as StepInfo, Stop as Stop
from ._checkpoints import Checkpoints as Checkpoints
from ._compiled import Compiled as Compiled
from ._history import History as History
from ._publish import load_published as load_published
from ._record import DamagedRecord as DamagedRecord
from ._result import TrainResult as TrainResult
from ._state import TrainState as TrainState
from ._trainer import Trainer as Trainer
