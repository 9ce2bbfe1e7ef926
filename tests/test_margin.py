"""Claims about experiments.margin: the rule by which the miniature's recipe was chosen."""

from experiments.margin import Look, arrival


def run_of(*realisms, broken=()):
    """Looks every 6 updates; broken {number of a look: share}."""
    shares = dict(broken)
    return [Look(6 * i, realism, 0.9, shares.get(i, 0.0), 10.0) for i, realism in enumerate(realisms)]


def test_it_arrives_at_the_first_look_that_reaches_the_goal():
    assert arrival(run_of(0, 0.3, 0.84, 0.85, 0.99, 1.0)).updates == 18


def test_it_never_arrives_below_the_goal_or_where_nobody_looked_on():
    assert arrival(run_of(0, 0.3, 0.5, 0.7)) is None
    assert arrival(run_of(0, 0.3, 0.5, 0.9)) is None  # the run ends before half as many updates more


def test_a_rate_that_breaks_pictures_until_half_as_many_updates_more_is_not_safe():
    looks = (0, 0.3, 0.9, 0.95, 0.99)
    assert arrival(run_of(*looks, broken=[(3, 0.03)])) is None
    assert arrival(run_of(*looks, broken=[(3, 0.02), (4, 0.5)])).updates == 12
