"""Every step of `bench.gpu_day` in one process, on small work, with a CUDA driver that does nothing; rows go to FOLDER.

Values are garbage there and clocks stand still. So comparisons of values are replaced by ones that accept all values,
and PyTorch's profiler, which needs a real device, by a fixed list of kernels.
"""

import json
import sys
import traceback
from pathlib import Path

import torch

from bench import correctness, environment, gpu_steps, graphs, host, report, timing, variants
from bench.cases import OpCase
from bench.results import Results
from bench.static_analysis import modelled, resource_model

torch.backends.cudnn.enabled = False  # its library needs a real driver
folder = Path(sys.argv[1])

reference = timing.Reference([], [])
timing.check = lambda job, reference: (job.results(), (0.0, 1.0))[1]
timing.Reference.worst = lambda reference, results: (0.0, 1.0)
variants.Subject.reference = reference
eager_or_ours = {name: recipe for name, recipe in variants.RECIPES.items() if recipe.compile is None}
variants.contenders = lambda mode, device, quick: tuple(
    name for name, recipe in eager_or_ours.items() if mode in recipe.modes and recipe.only != "cpu"
)
correctness.reference_of = lambda case, inputs: timing.Reference([], [])
correctness.cases = lambda device: [OpCase("convnext_block", (2, 9, 7, 40), "bfloat16", "both")]
correctness.OFTEN_SHAPES = ((1, 9, 7, 96),)
correctness.HUGE_MEMORY = 1 << 60
environment.measured_rates = lambda device, dtypes: environment.Roofline(dict.fromkeys(dtypes, 1e15), 4e12, "hollow")
gpu_steps.VARIANT, gpu_steps.SIDE, gpu_steps.BUDGET, gpu_steps.HOST_ROUNDS = "atto", 64, 0.01, 1
gpu_steps.WIDE = (2, 9, 7, 40)
gpu_steps.HOST_CONTENDERS = ("eager transformers", "fused", "frozen")
gpu_steps.BATCHES = {"one": 1, "many": 2, "training": 2}
graphs.VARIANT, graphs.SIDE, graphs.REPLAYS = "atto", 64, 1
host.WARM_UP, host.STEPS = 2, 1
timing.MOST_ROUNDS = timing.LEAST_ROUNDS = 1
for name in ("training_64", "inference_128"):
    del resource_model.PASSES[name]
resource_model.PASSES["training_64_autocast"]["batch"] = 2
modelled.rows = lambda: iter(())
graphs.kernel_events = lambda replay, device: (replay(), [("_fc1_kernel", 1.0), ("other", 2.0)])[1]

results = Results(folder, environment.facts(torch.device("cuda")))
errors = {}
for step in (*gpu_steps.STEPS, *gpu_steps._HIDDEN):
    if step.name == "max-autotune" or step.variables:
        continue  # compiles for minutes; a variant is the same code in another environment
    try:
        for row in step.run(torch.device("cuda")):
            results.add(row)
            print(report.line(row), flush=True)
    except Exception:
        errors[step.name] = traceback.format_exc()
report.write(folder)
print(json.dumps(errors))
