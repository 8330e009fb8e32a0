"""Runs a recipe under DeepSpeed on a CPU, which accelerate itself does on GPUs only.

    accelerate launch --config_file recipes/launch/deepspeed_zero3.yaml --use_cpu ... tests/deepspeed_on_cpu.py RECIPE ...

All that is changed is accelerate's answer to the question of how the processes work together.
"""

import runpy
import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

begin = AcceleratorState.__init__


def begin_sharded(self, *args, deepspeed_plugin=None, **kwargs):
    begin(self, *args, deepspeed_plugin=deepspeed_plugin, **kwargs)
    if deepspeed_plugin is not None:
        deepspeed_plugin.set_mixed_precision(self._mixed_precision)
        deepspeed_plugin.select(_from_accelerator_state=True)
        self.deepspeed_plugins = {"default": deepspeed_plugin}
        PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.DEEPSPEED


AcceleratorState.__init__ = begin_sharded
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
