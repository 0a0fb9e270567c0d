from dataclasses import replace

from bitlm_dist.training.readback import Moment
from bitlm_dist.training.step_pipeline import StepReport
from bitlm_dist.training.train_state import TrainState

REPORT = StepReport(
    values={"num_tokens_and_bytes": [90.0, 250.0]},
    recorded={},
    lr_multiplier=1.0,
    data_wait_seconds=0.0,
    completed=Moment(0.0, 0.0, 0.0),
    seconds=0.5,
    cpu_seconds=0.25,
)


def test_every_counter_moves_with_a_step():
    state = TrainState(7, 1000, 900, 3000, 1.0, 2.0, 50)
    after = state.after(REPORT, num_sequences=8, sequence_length=32)
    assert after == TrainState(8, 1256, 990, 3250, 1.5, 2.25, 58)


def test_counts_that_an_old_checkpoint_lacks_stay_unknown():
    record = TrainState(7, 1000, 900, 3000, 1.0, 2.0, 50).record()
    assert TrainState.from_checkpoint({**record, "finite": True}).record() == record

    del record["predicted_tokens"], record["text_bytes"]
    after = TrainState.from_checkpoint(record).after(REPORT, 8, 32)
    assert (after.predicted_tokens, after.text_bytes, after.tokens) == (None, None, 1256)


def test_lines_of_the_logs_have_all_but_the_position_in_the_data():
    state = replace(TrainState(), step=3, next_sequence=24)
    assert state.record().keys() - state.progress().keys() == {"next_sequence"}
    assert state.progress()["step"] == 3
