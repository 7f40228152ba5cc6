"""How often alerts are false: healthy trainings on real digits, and beside them sick ones that have to be noticed.

    python tests/benchmarks/false_alarms.py [--seeds 1] [--processes 2] [--only NAME]

Every training is sampled at the callbacks' default cadence: the first 20 optimizer steps, then every 50th. A healthy
one counts if it reaches its accuracy; whatever is told of it is a false alarm. A sick one is noticed if one of the
rules that its fault should set off speaks.
"""

import argparse
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from runs import HEALTHY, SICK
from trainings import digits, run

from bn_lightning.monitoring import AlertRules


def outcome(place):
    """Run one training in a process of its own: what it does not share is the random state."""
    sick, index, seed = place
    torch.set_num_threads(1)
    return run((SICK if sick else HEALTHY)[index], AlertRules(), digits(), seed)


def told(alerts):
    return ", ".join(f"{alert.rule} in {alert.layer!r} at {alert.step}" for alert in alerts)


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seeds", type=int, default=1)
    arguments.add_argument("--processes", type=int, default=2)
    arguments.add_argument("--only", default="", help="run the trainings whose names hold this")
    options = arguments.parse_args()
    places = [
        (sick, index, seed)
        for sick, trainings in enumerate((HEALTHY, SICK))
        for index, training in enumerate(trainings)
        for seed in range(options.seeds)
        if options.only in training.name
    ]
    false, unhealthy, missed = Counter(), [], []
    rules_told, rules_expected = Counter(), Counter()
    runs = samples = 0
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        for (sick, index, _), result in zip(places, pool.map(outcome, places), strict=True):
            training = (SICK if sick else HEALTHY)[index]
            names = {alert.rule for alert in result.alerts}
            print(
                f"{'sick' if sick else 'healthy':7s}  {training.name:42s} {result.accuracy:6.1%}  {told(result.alerts)}"
            )
            if sick:
                rules_expected.update([training.expected])
                rules_told.update([training.expected] if names & set(training.expected) else [])
                missed += [] if names & set(training.expected) else [training.name]
            elif result.accuracy < training.accuracy:
                unhealthy.append(training.name)
            else:
                runs, samples = runs + 1, samples + result.samples
                false.update(alert.rule for alert in result.alerts)
    print(f"\n{'rule':22s} false alarms in {runs} healthy runs ({samples} samples)   sick runs noticed")
    for rule in AlertRules.names:
        faults = [expected for expected in rules_expected if expected[0] == rule]
        noticed = f"{sum(rules_told[each] for each in faults)} of {sum(rules_expected[each] for each in faults)}"
        print(f"{rule:22s} {false[rule]:<52d} {noticed}")
    print(f"\nnot noticed: {', '.join(missed) or 'none'}")
    print(f"not counted, did not reach their accuracy: {', '.join(unhealthy) or 'none'}")


if __name__ == "__main__":
    main()
