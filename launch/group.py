"""Ray Train's TorchTrainer, without the helpers that a run here has no use for, each a process of its own in every attempt:

- the manager of Ray Data sets: the data is sivae's own,
- the coordinator that asks the autoscaler for room, which outlives the run: cluster.Demand asks, and takes it back,
- the janitor of places, unless the run wants it: without, they go when the driver leaves the cluster.
"""

from __future__ import annotations

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy


class Trainer(TorchTrainer):
    def __init__(self, *arguments, janitor: bool, **options):
        super().__init__(*arguments, **options)
        self._unused = (DatasetsCallback,) if janitor else (DatasetsCallback, PlacementGroupCleanerCallback)

    def _create_default_callbacks(self):
        return [one for one in super()._create_default_callbacks() if not isinstance(one, self._unused)]

    def _initialize_and_run_controller(self, **options):
        return super()._initialize_and_run_controller(**options | {"scaling_policy": Fixed(self.scaling_config)})


class Fixed(FixedScalingPolicy):
    """So many workers as were asked for, and nothing asked of the autoscaler."""

    def after_controller_start(self, train_run_context):
        pass

    def _maybe_send_resource_request(self):
        pass
