"""Claims about experiments.margin: the rule by which the miniature's recipe was chosen."""

from experiments import margin


def run_of(*realisms, broken=(), frechet=10.0):
    """The log of looks every 6 updates, from update 6; broken {number of a look: share}."""
    shares = dict(broken)
    return [{"step": 6 * i, "watch": {"realism": realism, "broken": shares.get(i, 0.0), "frechet": frechet}}
            for i, realism in enumerate(realisms, 1)]


def test_it_arrives_at_the_first_look_that_reaches_the_goal():
    log = run_of(0.3, 0.84, 0.85, 0.99, 1.0)
    assert margin.arrival(log)["step"] == 18 and margin.is_safe(log)


def test_it_is_not_safe_below_the_goal_or_where_nobody_looked_on():
    assert margin.arrival(run_of(0.3, 0.5, 0.7)) is None and not margin.is_safe(run_of(0.3, 0.5, 0.7))
    assert not margin.is_safe(run_of(0.3, 0.5, 0.9))  # the run ends before half as many updates more


def test_a_rate_that_breaks_pictures_until_half_as_many_updates_more_is_not_safe():
    looks = (0.3, 0.9, 0.95, 0.99)
    assert not margin.is_safe(run_of(*looks, broken=[(3, 0.03)]))
    assert margin.is_safe(run_of(*looks, broken=[(3, 0.02), (4, 0.5)]))


def test_of_the_safe_rates_the_nearest_to_true_photos_is_chosen():
    logs = {1e-5: run_of(0.3, 0.9, 1.0, frechet=8.0), 2e-5: run_of(0.9, 1.0, 1.0, frechet=9.0),
            3e-5: run_of(0.9, 1.0, 1.0, broken=[(1, 0.1)], frechet=1.0)}
    assert margin.chosen(logs) == 1e-5
    assert margin.chosen({3e-5: logs[3e-5]}) is None
