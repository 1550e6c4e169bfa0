"""A damaged `config.json` beside whole weights: refused by name, before a weight is made."""

import copy
import functools
import json
import random

import pytest

from qwen3_next import MTPConfig, Qwen3Next, Qwen3NextClassifier
from qwen3_next.layers import TokenEmbedding
from tests.support.running import BACKEND
from tests.support.small_models import ONE_LAYER, small

pytestmark = pytest.mark.skipif(BACKEND != "jax", reason="files know no backend")

VALUES = [
    None,
    True,
    0,
    -1,
    3,
    10**6,
    10**12,
    10**400,
    2.5,
    float("nan"),
    1e-40,
    "",
    "a",
    "float32",
]
VALUES += ["qwen3_next", "qwen3", "keras>Dense", "qwen3_next>GroupedAdamW", "qwen3_next>Qwen3Next"]
VALUES += [[], [1], ["a"], [None], [[1]], {}, {"a": 1}, {"0": "a"}]


class Built(Exception):
    pass


@functools.cache
def model(cls):
    mtp = MTPConfig(num_predict_tokens=1, speculation_lookahead=1)
    fields = {"mtp": mtp} if cls is Qwen3Next else {"num_labels": 3}
    return small(cls, **fields, **ONE_LAYER)


def damage(fields, rng):
    """One wrong, missing or surplus value at a random depth."""
    inner = [value for value in fields.values() if isinstance(value, dict) and value]
    if inner and rng.random() < 0.6:
        damage(rng.choice(inner), rng)
        return
    name = rng.choice([*fields, "extra"])
    fields[name] = rng.choice(VALUES)
    if rng.random() < 0.3:
        del fields[name]


@pytest.mark.parametrize("method", ["save_to_preset", "export_to_transformers"])
@pytest.mark.parametrize("cls", [Qwen3Next, Qwen3NextClassifier])
def test_a_damaged_configuration_is_accepted_or_refused_by_name(cls, method, tmp_path, monkeypatch):
    def build(self, *args, **kwargs):
        raise Built

    getattr(model(cls), method)(tmp_path)
    monkeypatch.setattr(TokenEmbedding, "__init__", build)
    path, rng, refused = tmp_path / "config.json", random.Random(method), 0
    whole = json.loads(path.read_text())
    with pytest.raises(Built):
        cls.from_preset(tmp_path, progress=False)
    for _ in range(200):
        saved = copy.deepcopy(whole)
        for _ in range(rng.randint(1, 2)):
            damage(saved, rng)
        path.write_text(json.dumps(saved))
        try:
            cls.from_preset(tmp_path, progress=False)
        except Built:
            continue
        except ValueError as error:
            words = ("Received", "Unknown", "must name a `model_type`", "does not fit the model")
            assert any(word in str(error) for word in (*words, "no published model type"))
            refused += 1
    assert refused > 60
