"""Marks of the config's fields: who may change a key of a run that has begun."""

from bitlm_dist.config import Config
from bitlm_dist.config_loading import all_fields, all_keys, marks_of_keys
from bitlm_dist.config_section import AllowedBy, Resume, Trained
from bitlm_dist.yaml_files import annotation_of

# What a resumed run may change: where it runs and writes, and what it does besides training.
RESUME = ("run.", "checkpoint.", "evaluation.", "sampling.", "logging.", "parallel.")
RESUME_KEYS = {
    *("data.path", "data.cache", "data.cache_limit", "data.workers", "data.new_mixture"),
    *("optimizer.sharded", "training.deterministic", "training.check_memory"),
}
# What evaluation and generation may change.
TRAINED = ("evaluation.", "sampling.", "logging.", "parallel.")
TRAINED_KEYS = {
    *("data.path", "data.cache", "data.cache_limit", "data.workers"),
    "model.backbone.attention",
}
EXECUTION_KEYS = {"model.backbone.attention"}


def with_mark(mark):
    return {key for key, found in marks_of_keys(type(mark)).items() if found is mark}


def test_marks_say_what_a_resumed_run_may_change():
    assert with_mark(Resume.FREE) == {k for k in all_keys() if k.startswith(RESUME)} | RESUME_KEYS
    assert with_mark(Resume.LENGTHEN) == {"training.steps"}
    assert marks_of_keys(AllowedBy) == {
        "data.sources": AllowedBy("data.new_mixture"),
        "training.global_batch_tokens": AllowedBy("checkpoint.new_global_batch"),
    }


def test_marks_say_what_a_key_is_to_a_trained_model():
    model = {k for k in all_keys() if k.startswith(("model.", "head.", "diffusion."))}
    free = {k for k in all_keys() if k.startswith(TRAINED)}
    assert with_mark(Trained.MODEL) == (model | {"preset"}) - EXECUTION_KEYS
    assert with_mark(Trained.FREE) == free | TRAINED_KEYS


def test_no_mark_contradicts_another():
    for key, field, _ in all_fields():
        marks = [mark for mark in field.metadata if isinstance(mark, Resume | Trained | AllowedBy)]
        assert len({type(mark) for mark in marks}) == len(marks), f"{key}: two marks of a kind"

    # What decides what the model computes never changes; a consent is a switch that is free to set.
    changeable = marks_of_keys(Resume).keys() | marks_of_keys(AllowedBy).keys()
    assert not with_mark(Trained.MODEL) & changeable
    assert not marks_of_keys(Resume).keys() & marks_of_keys(AllowedBy).keys()
    for allowed_by in marks_of_keys(AllowedBy).values():
        assert annotation_of(Config, allowed_by.key) is bool
        assert allowed_by.key in with_mark(Resume.FREE)
