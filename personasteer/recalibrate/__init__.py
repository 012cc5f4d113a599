"""Training that leaves a quantized model's character alone, or brings it back: LoRA adapters for GGUF files."""

from personasteer.recalibrate.examples import Example, Examples, read_examples, task_loss
from personasteer.recalibrate.fallback import Remedy, best_remedy, read_features, remedies, write_remedy
from personasteer.recalibrate.measures import Change, Probe, Shown, can_be_probed, change, make_probes, measure, removed
from personasteer.recalibrate.results import Finetuned, Point, Realigned
from personasteer.recalibrate.run import finetune, realign
from personasteer.recalibrate.training import Recipe

__all__ = [
    "Change",
    "Example",
    "Examples",
    "Finetuned",
    "Point",
    "Probe",
    "Realigned",
    "Recipe",
    "Remedy",
    "Shown",
    "best_remedy",
    "can_be_probed",
    "change",
    "finetune",
    "make_probes",
    "measure",
    "read_examples",
    "read_features",
    "realign",
    "remedies",
    "removed",
    "task_loss",
    "write_remedy",
]
