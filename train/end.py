"""The end of a run: writing its weights in every form, and evaluating each form."""

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import numpy as np

import repvgg_jax as rv
from repvgg_jax.paths import Place
from repvgg_jax.quantization.qat import QATRepVGG, quantized_net, without_ranges
from repvgg_jax.weights import save_weights

from . import cluster
from .evaluate import Evaluation
from .loop import Watchers, record_evaluation
from .parallel import replicate, sum_over_processes, to_host
from .run import DEPLOY_OF, FORMS, Run, make_evaluator, trained_forms
from .state import TrainState


@dataclasses.dataclass(frozen=True)
class Result:
    """Result of a finished run: each form's evaluation and weight file, by the form's name."""

    evaluations: dict[str, Evaluation]
    weights: dict[str, Place]

    def summary(self) -> dict[str, float]:
        """Return the test accuracies by form; until 0.3, under the names of version 0.1 too: `FORM_top1`."""
        top1 = {name: evaluation.top1 for name, evaluation in self.evaluations.items()}
        deprecated = {f"{name}_top1": value for name, value in top1.items()}
        return {f"test_top1_{FORMS[name].result}": value for name, value in top1.items()} | deprecated


def finish(run: Run, state: TrainState, watchers: Watchers) -> Result:
    """Write the weights in every form and evaluate each; float nets are evaluated in float32, the files' dtype."""
    evaluations: dict[str, Evaluation] = {}
    weights: dict[str, Place] = {}
    described: dict[str, Any] = dict(
        preprocessing=run.dataset.preprocessing, class_names=tuple(run.dataset.class_names)
    )
    model = rv.create_model(run.model.variant, run.model.num_classes, dtype=run.model.dtype)
    in_float32 = watchers.evaluator
    if run.model.dtype != np.float32:
        in_float32 = make_evaluator(run, run.model.clone(dtype=np.float32))

    def file(name: str) -> Place:
        weights[name] = run.workdir / f"{FORMS[name].file}.safetensors"
        return weights[name]

    def record(name: str, evaluation: Evaluation) -> None:
        evaluations[name] = evaluation
        record_evaluation(run, evaluation, name, run.total_steps, watchers)

    def note_files(*names: str) -> None:
        files = (f"{weights[name]} ({FORMS[name].kind})" for name in names)
        watchers.progress.note(f"weights: {', '.join(files)}")

    for trained, replicated in trained_forms(state).items():
        fused, variables = DEPLOY_OF[trained], without_ranges(to_host(replicated))
        deploy_model, deploy_variables = rv.to_deploy(model, variables)
        files = file(trained), file(fused)
        if cluster.is_leader():
            save_weights(files[0], model, variables, num_batches_tracked=run.total_steps, **described)
            save_weights(files[1], deploy_model, deploy_variables, **described)
        with exact_float32():
            evaluation = in_float32(replicated)
            of_fused = make_evaluator(run, deploy_model.clone(dtype=np.float32))(replicate(deploy_variables))
        record(trained, evaluation)
        record(fused, of_fused)
        same = sum_over_processes(int((evaluation.predictions == of_fused.predictions).sum()))
        watchers.progress.note(
            f"{FORMS[trained].title} and {FORMS[fused].title}, both computed in float32, predict the same class for "
            f"{same} of {evaluation.images} test images"
        )
        note_files(trained, fused)
    if isinstance(run.model, QATRepVGG):
        net = quantized_net(run.model, to_host(trained_forms(state)["train"]), **described)
        path = file("int8")
        if cluster.is_leader():
            rv.save_quantized(path, net)
        record("int8", make_evaluator(run, net)(replicate(net.variables)))
        note_files("int8")
    return Result(evaluations, weights)


def exact_float32() -> AbstractContextManager[object]:
    """Return a context that computes float32 exactly; with TF32, the default on GPUs, the two forms would differ."""
    on_cpu = jax.default_backend() == "cpu"
    return nullcontext() if on_cpu else jax.default_matmul_precision("float32")
