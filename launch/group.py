"""Ray Train's TorchTrainer, with as few processes as a run here has use for. Each would be started anew in every attempt:

- the controller, which watches the workers, runs in the driver, and ends with it,
- the manager of Ray Data sets is left out: the data is sivae's own,
- so is the coordinator that asks the autoscaler for room, which outlives the run: cluster.Demand asks, and takes it back,
- so is the janitor of places, unless the run wants it: without, they go when the driver leaves the cluster.
"""

from __future__ import annotations

import asyncio
import os

import ray
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import placement_group_callback
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.controller.placement_group_cleaner import PlacementGroupCleaner
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup


class Janitor(PlacementGroupCleaner):
    """Ray's, told which cluster is its own. It would look around on the machine, and die where it finds another Ray as well."""

    def __init__(self, *arguments, **options):
        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        super().__init__(*arguments, **options)


placement_group_callback.PlacementGroupCleaner = Janitor


class Trainer(TorchTrainer):
    def __init__(self, *arguments, janitor: bool, **options):
        super().__init__(*arguments, **options)
        self._unused = (DatasetsCallback,) if janitor else (DatasetsCallback, PlacementGroupCleanerCallback)

    def _create_default_callbacks(self):
        return [one for one in super()._create_default_callbacks() if not isinstance(one, self._unused)]

    def _initialize_and_run_controller(self, **options):
        controller = Controller(**options | {"scaling_policy": Fixed(self.scaling_config)})
        asyncio.run(controller.run())
        return controller.get_result()


class Workers(WorkerGroup):
    def _start(self):
        """Ray's, which keeps the places of workers that came and then could not form a group."""
        try:
            super()._start()
        except Exception:
            if self.has_started():
                self._worker_group_state.shutdown()
                self._clear_state()
            raise

    def _init_train_context_on_workers(self, workers, sync_actor, train_context_args):
        """Ray's, without a handle of the controller's process, by which workers could ask for what they reported."""
        ray.get(
            [
                worker.actor.init_train_context.remote(
                    train_run_context=self._train_run_context, distributed_context=worker.distributed_context,
                    synchronization_actor=sync_actor, storage_context=self._storage_context,
                    worker_callbacks=self._worker_callbacks_to_propagate, controller_actor=None,
                    **{name: values[index] for name, values in train_context_args.items()},
                )
                for index, worker in enumerate(workers)
            ]
        )  # fmt: skip
        self._decorate_worker_log_file_paths(workers)


class Controller(TrainController):
    worker_group_cls = Workers


class Fixed(FixedScalingPolicy):
    """So many workers as were asked for, and nothing asked of the autoscaler."""

    def after_controller_start(self, train_run_context):
        pass

    def _maybe_send_resource_request(self):
        pass
