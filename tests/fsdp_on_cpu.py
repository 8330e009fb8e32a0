"""Runs a recipe with its model sharded over processes on a CPU, which accelerate itself does on GPUs only.

    accelerate launch --config_file recipes/launch/fsdp2.yaml --use_cpu ... tests/fsdp_on_cpu.py RECIPE [ARGUMENTS ...]

All that is changed is accelerate's answer to the question of how the processes work together.
"""

import runpy
import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

begin = AcceleratorState.__init__


def begin_sharded(self, *args, fsdp_plugin=None, **kwargs):
    begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin
        PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP


AcceleratorState.__init__ = begin_sharded
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
