"""The loss of layer routers against closed forms, and planted routes that routers learn."""

import functools
from typing import NamedTuple

import keras
import numpy as np
import pytest

from qwen3_next import (
    FocalLoss,
    Qwen3Next,
    Qwen3NextClassifier,
    RouterTrainer,
    effective_number_weights,
    pad,
)
from tests.support.running import assert_close, assert_slopes, gradients, run, to_numpy
from tests.support.small_models import random_ids, small
from tests.support.thinking_models import think

RNG = np.random.default_rng(0)
LOGITS = (2 * RNG.normal(size=(5, 2, 3))).astype("float32")
ACTIONS = RNG.integers(0, 3, (5, 2)).astype("int32")
ALPHA = (0.5, 1.0, 2.5)


def focal(logits, gamma, alpha=ALPHA, actions=ACTIONS):
    """The loss of every action, in the dtype of the logits."""
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    p = np.take_along_axis(p, actions[..., None], axis=-1)[..., 0]
    return -np.array(alpha)[actions] * (1 - p) ** gamma * np.log(p)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_the_focal_loss_is_that_of_its_definition(gamma):
    loss = FocalLoss(ALPHA, gamma)
    expected = focal(LOGITS.astype("float64"), gamma)
    assert_close(run(loss.call, ACTIONS, LOGITS), expected, 1e-6)
    assert_close(to_numpy(loss(ACTIONS, LOGITS)), expected.mean(), 1e-6)


def test_without_focus_it_is_the_cross_entropy():
    expected = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(ACTIONS, LOGITS)
    assert_close(to_numpy(FocalLoss(gamma=0.0)(ACTIONS, LOGITS)), to_numpy(expected), 1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_the_gradient_of_the_focal_loss_is_its_slope(gamma):
    cotangent = RNG.normal(size=ACTIONS.shape).astype("float32")
    found = gradients(FocalLoss(ALPHA, gamma).call, [ACTIONS, LOGITS], cotangent)
    assert_slopes(lambda _, logits: focal(logits, gamma), [ACTIONS, LOGITS], cotangent, found)


def test_a_focal_loss_comes_back_from_its_configuration():
    loss = FocalLoss(ALPHA, 1.5, name="routes")
    again = keras.losses.deserialize(keras.losses.serialize(loss))
    assert again.get_config() == loss.get_config()
    assert (again.class_weights, again.gamma, again.name) == ([*ALPHA], 1.5, "routes")


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999])
def test_class_weights_are_those_of_the_effective_numbers(beta):
    counts = [40, 1200, 7]
    effective = [sum(beta**power for power in range(count)) for count in counts]
    expected = np.array([1 / number for number in effective])
    found = effective_number_weights(counts, beta)
    np.testing.assert_allclose(found, 3 * expected / expected.sum(), rtol=1e-9)
    assert sum(found) == pytest.approx(3)


def test_an_action_that_never_occurs_counts_as_one_that_occurs_once():
    assert effective_number_weights([0, 9, 4]) == effective_number_weights([1, 9, 4])


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: FocalLoss(class_weights=(1.0, 1.0)), "class_weights"),
        (lambda: FocalLoss(class_weights=(1.0, -1.0, 1.0)), "class_weights"),
        (lambda: FocalLoss(gamma=-0.1), "gamma"),
        (lambda: FocalLoss(class_weights=5), "class_weights"),
        (lambda: effective_number_weights(5), "counts"),
        (lambda: effective_number_weights([1, 2]), "counts"),
        (lambda: effective_number_weights([1, -2, 3]), "counts"),
        (lambda: effective_number_weights([1, 2, 3], 1.0), "beta"),
    ],
)
def test_bad_arguments_are_refused_by_name(make, name):
    with pytest.raises(ValueError, match=f"`{name}` must be .*Received: {name}="):
        make()


# Two layers that think, both of one kind: little to compile.
ETD = {"n_encoder_layers": 0, "n_think_layers": 2, "n_decoder_layers": 0}
ETD |= {"max_think_iterations": 2, "adaptive_depth": False}
ROUTER = {"hidden_size": 16, "window_size": 1, "num_windows": 4}
ROUTED = {"use_layer_router": True, "layer_router": ROUTER}
DENSE = {"num_layers": 2, "num_experts": 0, "mlp_only_layers": ()}
DENSE |= {"layer_types": ("full_attention",) * 2}
# The first token of a prompt says its route.
ROUTES = {3: [0, 1], 11: [2, 0], 25: [1, 2], 40: [1, 1]}
FIRST = np.tile([*ROUTES], 6)
PROMPTS = [[n, *random_ids(i % 4, seed=i).tolist()] for i, n in enumerate(FIRST.tolist())]
LABELS = np.array([ROUTES[n] for n in FIRST.tolist()], "int32")


def routable(model=Qwen3Next, **changes):
    return small(model, etd={**ETD, **ROUTED}, **DENSE, **changes)


def trainer_of(model, **options):
    trainer = RouterTrainer(model, **options)
    trainer.compile(keras.optimizers.AdamW(0.02), FocalLoss(), metrics=["accuracy"])
    return trainer


class Run(NamedTuple):
    """A training of routers: the model, its values before, and the history."""

    model: Qwen3Next
    before: dict
    history: dict


def untrained():
    model, rng = routable(), np.random.default_rng(5)
    for router in model.backbone.think_loop.routers:
        router.score.kernel.assign(rng.normal(size=router.score.kernel.shape))
    return model


@functools.cache
def first_logits():
    """Logits of the labels' routes and of free ones, before any training."""
    model, rows = untrained(), pad(PROMPTS)
    prompts = {**rows, "prompt_mask": np.ones_like(rows["padding_mask"])}
    return [
        to_numpy(think(model.backbone, inputs, think_iterations=1).thinking.route_logits)
        for inputs in ({**prompts, "route": LABELS}, prompts)
    ]


@functools.cache
def trained(teacher_forcing):
    model = untrained()
    before = values(model)
    trainer = trainer_of(model, teacher_forcing=teacher_forcing)
    told = trainer.fit(pad(PROMPTS), LABELS, batch_size=len(LABELS), epochs=60, verbose=0)
    return Run(model, before, told.history)


def values(model):
    return {v.path: to_numpy(v.value).copy() for v in model.variables}


@pytest.mark.parametrize("teacher_forcing", [True, False])
def test_planted_routes_are_learned_and_decided(teacher_forcing):
    done = trained(teacher_forcing)
    assert done.history["accuracy"][-1] == 1.0
    np.testing.assert_array_equal(done.model.decide(PROMPTS)["route"], LABELS)


@pytest.mark.parametrize("teacher_forcing", [True, False])
def test_nothing_but_the_routers_is_trained(teacher_forcing):
    model, before, _ = trained(teacher_forcing)
    routers = {v.path for r in model.backbone.think_loop.routers for v in r.variables}
    after = values(model)
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == routers == {v.path for v in model.trainable_variables}


@pytest.mark.parametrize("teacher_forcing", [True, False])
def test_a_step_takes_the_routes_of_the_labels_if_it_is_told_to(teacher_forcing):
    done = trained(teacher_forcing)
    losses = [focal(x, 2.0, (1, 1, 1), LABELS).mean() for x in first_logits()]
    assert abs(losses[0] - losses[1]) > 0.01
    expected = losses[0] if teacher_forcing else losses[1]
    assert done.history["loss"][0] == pytest.approx(expected, rel=1e-5)


def test_the_routers_of_a_classifier_are_what_trains():
    model = routable(Qwen3NextClassifier, num_labels=3)
    trainer, routers = trainer_of(model), model.backbone.think_loop.routers
    assert trainer.predict(pad(PROMPTS), batch_size=24, verbose=0).shape == (24, 2, 3)
    own = {v.path for router in routers for v in router.variables}
    assert {v.path for v in trainer.trainable_variables} == own


class Batches(keras.utils.PyDataset):
    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x, y

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.x, self.y


ROWS = random_ids(2, 3)
TWO_LABELS = np.array([[1, 0], [2, 1]])
DOORS = {
    "fit": lambda trainer, x, y: trainer.fit(x, y, verbose=0),
    "fit on a data set": lambda trainer, x, y: trainer.fit(Batches(x, y), verbose=0),
    "validation": lambda trainer, x, y: trainer.fit(
        ROWS, TWO_LABELS, validation_data=(x, y), verbose=0
    ),
    "validation on a data set": lambda trainer, x, y: trainer.fit(
        ROWS, TWO_LABELS, validation_data=Batches(x, y), verbose=0
    ),
    "evaluate": lambda trainer, x, y: trainer.evaluate(x, y, verbose=0),
    "evaluate on a data set": lambda trainer, x, y: trainer.evaluate(Batches(x, y), verbose=0),
    "train_on_batch": lambda trainer, x, y: trainer.train_on_batch(x, y),
    "test_on_batch": lambda trainer, x, y: trainer.test_on_batch(x, y),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (ROWS, None, r"labels, `y`.*Received: y=None"),
        (ROWS, TWO_LABELS[:, :1], r"shape \(rows, 2\).*\(2, 1\)"),
        (ROWS, TWO_LABELS[:, 0], r"shape \(rows, 2\).*\(2,\)"),
        (ROWS, [[1], [1, 0]], "`y` must be an array"),
        (ROWS, TWO_LABELS + 1, r"actions, 0 \(skip\).*\[1 2 3\]"),
        (ROWS, TWO_LABELS - 1, r"actions, 0 \(skip\).*\[-1"),
        (ROWS, TWO_LABELS.astype("float32"), r"actions, 0 \(skip\)"),
        (ROWS + 61, TWO_LABELS, "vocab_size=61"),
    ],
)
def test_what_cannot_be_learned_is_refused_and_costs_no_weight(door, x, y, message):
    trainer = refusing()
    # Within a data set TensorFlow raises its own.
    with pytest.raises(Exception, match=message):
        DOORS[door](trainer, x, y)
    assert all(np.isfinite(weight).all() for weight in trainer.get_weights())


@functools.cache
def refusing():
    return trainer_of(routable())


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: refusing().predict(ROWS + 61, verbose=0), "vocab_size=61"),
        (lambda: refusing().predict_on_batch(ROWS + 61), "vocab_size=61"),
        (lambda: refusing().predict(ROWS[:0], verbose=0), "`x` must hold at least one row"),
        (lambda: refusing().fit(ROWS[:0], TWO_LABELS[:0]), "`x` must hold at least one row"),
        (lambda: refusing().fit(ROWS, TWO_LABELS, validation_data=[]), "`validation_data` must be"),
        (
            lambda: refusing().fit(ROWS, TWO_LABELS, class_weight={0: 2.0}, verbose=0),
            "`class_weight` is for rows with one label",
        ),
        (lambda: refusing().fit(ROWS, TWO_LABELS, batch_size=0), "`batch_size` must be"),
        (lambda: refusing().fit(ROWS, TWO_LABELS, 2.5), "`batch_size` must be"),
        (
            lambda: refusing().evaluate(
                {"token_ids": ROWS, "route": TWO_LABELS + 6}, TWO_LABELS, verbose=0
            ),
            "`route` must hold actions",
        ),
    ],
)
def test_other_data_is_refused_by_name(call, name):
    with pytest.raises(ValueError, match=f"{name}.*Received"):
        call()


def test_losses_and_metrics_by_name_are_those_of_logits():
    trainer, name = trainer_of(routable()), "sparse_categorical_crossentropy"
    logits = trainer.predict(ROWS, verbose=0).astype("float64")
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -np.log(np.take_along_axis(shares, TWO_LABELS[..., None], axis=-1)).mean()
    trainer.compile("sgd", name, metrics=[name])
    found = trainer.evaluate(ROWS, TWO_LABELS, verbose=0)
    np.testing.assert_allclose(found, [expected, expected], rtol=1e-4)
    with pytest.raises(ValueError, match=r"`steps_per_execution` must be .*Received: steps_per"):
        trainer.compile("sgd", name, steps_per_execution=0)


def test_weights_of_rows_weigh_rows_even_where_there_are_as_many_layers():
    trainer = trainer_of(untrained())
    weights = np.array([[2.0], [0.5]])
    losses = focal(trainer.predict(ROWS, verbose=0).astype("float64"), 2.0, (1,) * 3, TWO_LABELS)
    for given in (np.repeat(weights, 2, axis=1), weights[:, 0], weights):
        trainer.compile("sgd", FocalLoss(), weighted_metrics=["accuracy"])
        loss, accuracy = trainer.evaluate(ROWS, TWO_LABELS, sample_weight=given, verbose=0)
        assert loss == pytest.approx((weights * losses).mean(), rel=1e-5)
        right = trainer.predict(ROWS, verbose=0).argmax(-1) == TWO_LABELS
        assert accuracy == pytest.approx((weights * right).mean() / weights.mean())
    trainer.train_on_batch(ROWS, TWO_LABELS, sample_weight=weights[:, 0])


@pytest.mark.parametrize("label", [-1, 3, 1.5])
def test_the_loss_of_a_label_that_is_no_action_is_not_a_number(label):
    losses = to_numpy(FocalLoss().call(np.array([[label, 1]]), LOGITS[:1]))
    np.testing.assert_array_equal(np.isnan(losses), [[True, False]])


@pytest.mark.parametrize(("labels", "logits"), [((1, 1), (1, 2, 3)), ((1, 2), (1, 2, 4))])
def test_the_loss_takes_one_label_for_each_prediction(labels, logits):
    with pytest.raises(ValueError, match=r"must have shape .*Received"):
        FocalLoss().call(np.ones(labels, "int32"), np.zeros(logits, "float32"))


def test_what_has_no_routers_cannot_be_trained():
    for model in (small(etd=ETD, **DENSE), small(**DENSE), keras.Sequential()):
        with pytest.raises(ValueError, match=r"`model` must be a Qwen3Next .* layer routers"):
            RouterTrainer(model)
    with pytest.raises(ValueError, match="`teacher_forcing` must be a bool"):
        RouterTrainer(routable(), teacher_forcing="yes")


def test_a_trainer_is_not_what_one_saves():
    with pytest.raises(NotImplementedError, match="not the trainer"):
        RouterTrainer(routable()).get_config()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_a_prediction_that_is_certain_has_a_gradient(gamma):
    logits = np.array([[[0, 30, 0]]], "float32")
    arrays = [np.array([[1]], "int32"), logits]
    found = gradients(FocalLoss(gamma=gamma).call, arrays, np.ones((1, 1), "float32"))
    np.testing.assert_allclose(found[1], np.zeros((1, 1, 3)), atol=1e-6)
