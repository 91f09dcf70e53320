"""Loading nets from the Hugging Face hub, by variant or repository, and pushing nets to it."""

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import RepVGGError, WeightsError, shown, system_errors
from ..files import scratch_folder
from ..net.model import RepVGG
from ..net.variants import Variant
from ..preprocess import Preprocessing
from . import hub_errors
from .hub import FILES, SCHEME, require_hub
from .loading import inspect_weights, load_with_info
from .model_card import MARK, TIMM_FILE, checked_metrics, model_card, timm_config
from .pretrained import find_pretrained
from .saving import save_weights

_REPOSITORY = re.compile(r"[^/@\s]+/[^/@\s]+")


def load_pretrained(name: str, num_classes: int | None = None) -> tuple[RepVGG, dict[str, Any]]:
    """Return a published variant with its ImageNet weights, from timm's repositories on the Hugging Face hub.

    The file is downloaded by huggingface_hub, with its cache (`HF_HOME`), offline mode (`HF_HUB_OFFLINE=1`), mirrors
    (`HF_ENDPOINT`) and token (`HF_TOKEN`). `inspect_weights("hf://RepVGG-A0")` returns the preprocessing.

    Args:
      name: one of `list_models()`; letter case does not matter.
      num_classes: number of classes. If it is not 1000, the classifier is newly initialised, with a `WeightsWarning`.

    Returns:
      `model, variables`, training form, float32, as from `load_weights`.

    Raises:
      UnknownModelError: no variant is called `name`.
      WeightsError: the hub has no weights of the variant, refuses access, or cannot be reached and the cache does not
        have them; or huggingface_hub is not installed.
      ValueError: `num_classes` is not positive.
    """
    row = find_pretrained(name)
    model, variables, _ = load_with_info(f"{SCHEME}{row.variant}", row.variant, num_classes, stacklevel=3)
    return model, variables


def from_hub(
    repo: str, name: str | Variant | None = None, num_classes: int | None = None, *, revision: str | None = None
) -> tuple[RepVGG, dict[str, Any]]:
    """Return the model and the variables from a repository on the Hugging Face hub, in any supported file format.

    Equivalent to `load_weights("hf://OWNER/REPOSITORY@REVISION")`, which has further options for files that were not
    written by `push_to_hub`. `inspect_weights` of that address returns the preprocessing and the class names.

    Args:
      repo: `OWNER/REPOSITORY`.
      name: expected variant, as for `load_weights`.
      num_classes: number of classes, as for `load_weights`.
      revision: branch, tag or commit; the newest if None.

    Returns:
      `model, variables`, in the form (training or deploy) that was pushed; float32.

    Raises:
      WeightsError: as `load_weights`, or the repository or the revision does not exist.
      UnknownModelError, ValueError: as `load_weights`.
    """
    address = f"{SCHEME}{_checked_repository(repo)}" + (f"@{revision}" if revision is not None else "")
    model, variables, _ = load_with_info(address, name, num_classes, stacklevel=3)
    return model, variables


def push_to_hub(
    repo: str,
    model: RepVGG,
    variables: Mapping[str, Any],
    *,
    preprocessing: Preprocessing | None = None,
    class_names: tuple[str, ...] | None = None,
    num_batches_tracked: int | None = None,
    license: str | None = None,
    metrics: Mapping[str, float] | None = None,
    dataset: str | None = None,
    timm: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Add RepVGG",
) -> str:
    """Upload a net to a repository on the Hugging Face hub, in one commit, for `from_hub`.

    The commit holds the native file (`model.safetensors`), a model card (`README.md`) and, if `timm` is set, a copy for
    timm (`timm.safetensors` and `config.json`; `timm.create_model("hf-hub:OWNER/REPOSITORY", pretrained=True)`). An
    existing README.md is kept, unless it contains the line that marks it as written by `push_to_hub`. The copy for timm
    of an earlier push is removed if there is no new one.

    Args:
      repo: `OWNER/REPOSITORY`; created if it does not exist.
      model: the model that `variables` belong to, in training or deploy form.
      variables: `{"params", "batch_stats"}`, or `{"params"}` in deploy form.
      preprocessing: how the model's images are prepared; the variant's published evaluation if None.
      class_names: names by class index.
      num_batches_tracked: training steps that the BN statistics have seen.
      license: licence of the weights, as the hub spells it (`mit`, `apache-2.0`, …).
      metrics: metrics for the model card, such as `{"top1": 0.9889}`.
      dataset: data set that the metrics were measured on.
      timm: add a copy for timm; the model must be a variant that timm has, in training form.
      private: make a new repository private; the account's default if None.
      revision: branch to commit to, created if it does not exist; `main` if None.
      message: commit message.

    Returns:
      The commit's URL.

    Raises:
      WeightsError: `repo` is not a repository name, `variables` do not belong to `model`, timm cannot build the net, a
        metric is not a number, huggingface_hub is not installed, or the hub refuses or cannot be reached. Nothing has
        been committed then.
    """
    repo, metrics = _checked_repository(repo), checked_metrics(metrics, dataset)
    if not message.strip():
        raise WeightsError("message must say something: the hub takes no commit without one")
    require_hub("push_to_hub")
    described: dict[str, Any] = dict(
        preprocessing=preprocessing, class_names=class_names, num_batches_tracked=num_batches_tracked
    )
    with scratch_folder("repvgg-", tempfile.gettempdir()) as folder:
        save_weights(folder / FILES[0], model, variables, **described)
        info = inspect_weights(folder / FILES[0], model.variant)
        texts = {"README.md": model_card(repo, info, license=license, metrics=metrics, dataset=dataset, timm=timm)}
        if timm:
            texts["config.json"] = json.dumps(timm_config(info), indent=2) + "\n"
            # Preprocessing and class names are in config.json.
            save_weights(folder / TIMM_FILE, model, variables, family="timm", num_batches_tracked=num_batches_tracked)
        with system_errors(WeightsError, f"cannot write to {folder}"):
            for name, text in texts.items():
                (folder / name).write_text(text, encoding="utf-8")
        with _answers(repo):
            return _commit(repo, folder, private, revision, message)


def _commit(repo: str, folder: Path, private: bool | None, revision: str | None, message: str) -> str:
    """Commit the files in a folder, and return the commit's URL."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(library_name="repvgg-jax")
    api.create_repo(repo, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)
    names = {path.name for path in folder.iterdir()}
    if api.file_exists(repo, "README.md", revision=revision):
        page = Path(api.hf_hub_download(repo, "README.md", revision=revision))
        if MARK not in page.read_text(encoding="utf-8", errors="replace"):
            names.remove("README.md")
    operations: list[Any] = [CommitOperationAdd(name, str(folder / name)) for name in sorted(names)]
    if TIMM_FILE not in names and api.file_exists(repo, TIMM_FILE, revision=revision):
        operations += [CommitOperationDelete(TIMM_FILE), CommitOperationDelete("config.json")]
    return api.create_commit(repo, operations, commit_message=message, revision=revision).commit_url


def _checked_repository(repo: str) -> str:
    if not isinstance(repo, str) or _REPOSITORY.fullmatch(repo) is None:
        raise WeightsError(f"{shown(repo)} is not a repository name; expected OWNER/REPOSITORY")
    return repo


@contextmanager
def _answers(repo: str) -> Iterator[None]:
    """Turn any exception raised by a push into a WeightsError."""
    try:
        yield
    except RepVGGError:
        raise
    except Exception as error:  # huggingface_hub's HTTP library raises its own exceptions
        raise WeightsError(f"cannot push to {repo}: {hub_errors.reason(error, repo)}") from error
