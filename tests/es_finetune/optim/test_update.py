"""Contract under test: one form of an update. What `tell` returns goes through JSON with every bit of it, f32 and f64
values included; it names the members that were given up.
"""

import json

import numpy as np
import pytest

from es_finetune.optim.shaping import SHAPINGS
from es_finetune.optim.update import Update, make_update

FITNESS = [0.1, 1e100, 3.0, -2.5, 1 / 3, 0.0]


@pytest.mark.parametrize("dropped", [(), (4, 1)])
@pytest.mark.parametrize("shaping", SHAPINGS)
def test_an_update_goes_through_json_with_every_bit(shaping, dropped):
    fitness = [[reward, 1.0] for reward in FITNESS] if shaping == "per_prompt" else FITNESS
    update = make_update(2**32 - 2, fitness, dropped, population=6, shaping=shaping, antithetic=False)
    assert update.dropped == tuple(sorted(dropped)) and update.scored == 6 - len(dropped)
    assert all(value == np.float32(value) for value in update.z) and any(update.z)
    line = update.to_json()
    assert ("dropped" in line) == bool(dropped)
    assert Update.from_json(json.loads(json.dumps(line))) == update
    assert Update.from_json({**line, "theta": "00"}) == update


def test_one_without_signal_has_no_z():
    update = make_update(0, 4 * [0.015], population=4, shaping="zscore", antithetic=False)
    assert update == (0, None, 4, 0.015, ()) == Update.from_json(update.to_json())


def test_the_partner_of_a_dropped_member_is_not_scored_but_was_not_given_up():
    update = make_update(0, FITNESS, {3}, population=6, shaping="ranks", antithetic=True)
    assert update.scored == 4 and update.z[2] == update.z[3] == 0 and update.dropped == (3,)
