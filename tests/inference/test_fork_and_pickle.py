"""Claim: where a predictor cannot work, in a forked process or a pickle, it says so at once."""

import copy
import dataclasses
import io
import json
import os
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import repvgg_jax as rv
from tests.helpers.pages import blocks
from tests.helpers.photos import PHOTO, encode
from tests.helpers.random_weights import random_variables
from tests.helpers.repository import ROOT

SMALL = rv.Variant((1, 1, 1, 1), (4, 4, 4, 8, 8))

FORKING = """
import os, sys, warnings
import numpy as np
warnings.simplefilter("ignore")  # JAX's own about fork
import repvgg_jax as rv

path = sys.argv[1]
model, variables = rv.load_weights(path)
predict = rv.make_predictor(model, variables, 1, 16) if sys.argv[2] == "predictor" else None
images = np.zeros((1, 16, 16, 3), np.float32)
sys.stdout.flush()
child = os.fork()
if not child:
    attempts = [lambda: rv.load_weights(path), lambda: rv.make_predictor(model, variables)]
    for attempt in [lambda: predict and predict(images)] + attempts:
        try:
            print("no error", attempt())
        except rv.RepVGGError as error:
            print(error)
    sys.stdout.flush()
    os._exit(0)
os.waitpid(child, 0)
if predict:
    print("parent", predict(images).shape)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("before", [pytest.param("weights", marks=pytest.mark.slow), "predictor"])
def test_a_forked_process_gets_an_error_instead_of_hanging(before, tmp_path):
    model = rv.create_model(SMALL, 5)
    deployed = rv.to_deploy(model, random_variables(model))
    rv.save_weights(tmp_path / "w.safetensors", *deployed)
    command = [sys.executable, "-c", FORKING, tmp_path / "w.safetensors", before]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    printed = done.stdout.splitlines()
    if before == "weights":
        assert printed[0] == "no error None"
        printed = printed[1:]
    else:
        assert printed.pop() == "parent (1, 5)"
        assert len(printed) == 3
    for line in printed:
        assert "forked from one that had loaded weights" in line
        assert "gunicorn without --preload" in line
        assert "spawn" in line


def test_predictors_cannot_be_pickled_or_copied():
    model = rv.create_model(SMALL, 5, deploy=True)
    predict = rv.make_predictor(model, random_variables(model), 1, 16)
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="call load_weights and make_predictor there"):
            attempt(predict)
    assert predict(np.zeros((1, 16, 16, 3), np.float32)).shape == (1, 5)


def test_the_serving_example_in_the_docs_answers_a_request(tmp_path, monkeypatch):
    (code,) = (block.code for block in blocks("docs/deployment.md") if "def app(environ" in block.code)
    model = rv.create_model(dataclasses.replace(SMALL, image_size=32), 5)
    rv.save_weights(tmp_path / "final.safetensors", model, random_variables(model))
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"rv": rv}
    exec(code, namespace)
    image = encode(PHOTO, "JPEG")
    statuses = []
    environ = {"wsgi.input": io.BytesIO(image), "CONTENT_LENGTH": str(len(image))}
    (body,) = namespace["app"](environ, lambda status, headers: statuses.append(status))
    assert statuses == ["200 OK"]
    assert sorted(set(json.loads(body))) == sorted(json.loads(body))
    assert len(json.loads(body)) == 3
