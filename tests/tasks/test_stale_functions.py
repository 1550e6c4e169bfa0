"""What is compiled for a model's steps does not outlive the variables that it was compiled for."""

import keras
import numpy as np
import pytest
from keras import ops

from qwen3_next import DistillationTrainer
from tests.support.running import CHEAPEST_STEPS
from tests.support.small_models import ONE_LAYER, random_ids, small

IDS = random_ids(2, 6)


def compiled(model, **options):
    model.compile(keras.optimizers.SGD(0.1), **options)
    return model


def logits(model):
    return ops.convert_to_numpy(model(IDS))


def with_lora(layer):
    layer.enable_lora(2)
    for variable in layer.trainable_variables:
        variable.assign(np.random.default_rng(0).standard_normal(variable.shape))


def test_a_step_after_lora_is_that_of_the_model_with_lora():
    model = compiled(small(**ONE_LAYER))
    for call in (model.predict, model.evaluate):
        call(IDS, verbose=0)
    with_lora(model.lm_head)

    np.testing.assert_allclose(model.predict(IDS, verbose=0), logits(model), rtol=1e-4, atol=1e-5)
    again = compiled(small(**ONE_LAYER))
    with_lora(again.lm_head)
    again.set_weights(model.get_weights())
    assert model.evaluate(IDS, verbose=0) == pytest.approx(again.evaluate(IDS, verbose=0))


def test_layers_may_be_frozen_in_turn_between_runs_of_other_depths():
    layer_types = ("full_attention", "full_attention")  # alike, so that values may be mistaken
    etd = {"n_think_layers": 2, "max_think_iterations": 2, "adaptive_depth": False}
    etd = {"n_encoder_layers": 0, "n_decoder_layers": 0, **etd}
    model = compiled(
        small(num_layers=2, layer_types=layer_types, num_experts=0, mlp_only_layers=(), etd=etd)
    )
    found = []
    for frozen in model.backbone.decoder_layers:
        frozen.trainable = False
        found.append(model.predict(IDS, verbose=0, think_iterations=1))
        frozen.trainable = True

    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-5)


def distilled(model):
    return DistillationTrainer(small(**ONE_LAYER), model)


@pytest.mark.parametrize("trainer", [lambda model: model, distilled], ids=["fit", "distill"])
def test_other_variables_are_trained_after_another_compile_alone(trainer):
    model = small(**ONE_LAYER)
    trained = compiled(trainer(model), **CHEAPEST_STEPS)
    trained.fit(IDS, verbose=0)
    model.lm_head.trainable = False
    kernel = ops.convert_to_numpy(model.lm_head.kernel)
    for call in (lambda: trained.fit(IDS, verbose=0), lambda: trained.train_on_batch(IDS)):
        with pytest.raises(ValueError, match=r"`compile` again.*differ by \['.*lm_head/kernel'\]"):
            call()

    compiled(trained, **CHEAPEST_STEPS).fit(IDS, verbose=0)
    np.testing.assert_array_equal(model.lm_head.kernel, kernel)
